"""How the form looks: one style block, in JupyterLab's own colours, so that it reads under light and dark themes."""

STYLE = """<style>
.lab-form { --line: var(--jp-border-color2, #ddd); --soft: var(--jp-ui-font-color2, #666);
  --bad: var(--jp-error-color0, #c62828); --good: var(--jp-success-color0, #2e7d32);
  font-family: var(--jp-ui-font-family); font-size: 12px; color: var(--jp-ui-font-color1);
  container-type: inline-size; overflow: hidden; }
.lab-form .widget-html-content { line-height: 1.4; font-size: 12px; overflow-wrap: anywhere; }
.lab-form .widget-html, .lab-form .jupyter-widgets { margin: 0; min-width: 0; }
.lab-form .lab-columns { display: grid; grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); gap: 0 20px; }
.lab-form .lab-grid { display: grid; grid-template-columns: 158px 150px minmax(0, 1fr); gap: 4px 10px;
  align-items: center; overflow: hidden; padding: 2px 0; }
.lab-form .lab-grid > * { width: auto; height: auto; }
.lab-form .lab-grid input[type="text"], .lab-form .lab-grid select { height: 25px; font-size: 12px; padding: 0 7px; }
.lab-form .widget-dropdown > select { background-image: url("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org\
/2000/svg' viewBox='0 0 18 18'><path d='M5 7l4 4 4-4' fill='none' stroke='%23888' stroke-width='2'/></svg>"); }
.lab-form .lab-label { font-family: var(--jp-code-font-family, monospace); font-size: 12px; }
.lab-form .lab-changed .lab-label::after { content: " ●"; color: var(--jp-brand-color1, #1976d2); font-size: 9px; }
.lab-form .lab-wide { grid-column: 2 / -1; }
.lab-form .lab-wide textarea { font-family: var(--jp-code-font-family, monospace); font-size: 12px; resize: vertical;
  line-height: 1.4; min-height: 0; }
.lab-form .lab-help { color: var(--soft); font-size: 11px; line-height: 1.3; }
.lab-form .lab-help .lab-clamp { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  overflow: hidden; }
.lab-form .lab-folded .lab-help .lab-clamp { -webkit-line-clamp: 5; }
.lab-form .lab-help .lab-limits { white-space: nowrap; color: var(--jp-ui-font-color1); }
.lab-form .lab-wrong.lab-help { grid-column: 2 / -1; }
.lab-form .lab-wrong .lab-message, .lab-form .lab-bad { color: var(--bad); }
.lab-form .lab-good { color: var(--good); }
.lab-form .lab-wrong input, .lab-form .lab-wrong textarea, .lab-form .lab-wrong select {
  border-color: var(--bad) !important; }
.lab-form .lab-head { font-weight: 600; padding: 4px 0 2px; }
.lab-form .lab-bar { display: flex; align-items: center; gap: 8px; padding: 2px 0 6px; overflow: hidden; }
.lab-form .lab-bar > .lab-grow { flex: 1 1 0; width: auto; }
.lab-form .lab-bar > button { width: auto; flex: none; padding: 0 12px; }
.lab-form .lab-picker { padding-bottom: 6px; overflow: hidden; gap: 3px; }
.lab-form .lab-picker > * { width: auto; }
.lab-form .lab-picker select { font-size: 12px; }
.lab-form .lab-page { padding: 6px 2px; min-height: 180px; overflow: hidden; }
.lab-form .lab-stale { opacity: .45; }
.lab-form .widget-tab > .widget-tab-contents { padding: 4px 8px; }
.lab-form .lm-TabBar-tab { min-width: 0; flex: 0 1 auto; }
.lab-form .jupyter-widget-Collapse-header { padding: 3px 8px; font-size: 12px; }
.lab-form .jupyter-widget-Collapse-contents { padding: 4px 8px; overflow: hidden; }
.lab-form .jupyter-widget-Collapse { margin-top: 3px; }
.lab-form table.lab-table { border-collapse: collapse; width: 100%; font-size: 12px; margin: 2px 0; color: inherit; }
.lab-form table.lab-table tr { background: none; }
.lab-form table.lab-table td, .lab-form table.lab-table th { padding: 3px 8px 3px 0; text-align: left; font-size: 12px;
  vertical-align: top; border-bottom: 1px solid var(--line); max-width: none; white-space: normal; }
.lab-form table.lab-table td:first-child { white-space: nowrap; color: var(--soft); }
.lab-form .lab-below:not(:empty) { padding-top: 12px; }
.lab-form .lab-soft { color: var(--soft); }
.lab-form pre.lab-script { background: var(--jp-layout-color2, #eee); color: var(--jp-ui-font-color1);
  padding: 8px 10px; font-size: 11.5px; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 460px; overflow-y: auto; margin: 4px 0; }
.lab-form .lab-meter { height: 6px; background: var(--jp-layout-color3, #ddd); margin-top: 3px; }
.lab-form .lab-meter div { height: 100%; background: var(--jp-brand-color1, #1976d2); }
.lab-form .lab-meter.lab-over div { background: var(--bad); }
@container (max-width: 1000px) { .lab-form .lab-grid { grid-template-columns: 122px 116px minmax(0, 1fr); } }
@container (max-width: 800px) { .lab-form .lab-columns { grid-template-columns: minmax(0, 1fr); } }
</style>"""
