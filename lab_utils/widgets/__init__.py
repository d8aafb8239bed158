"""What a researcher touches in a notebook: the launch form, the live view of a run, the table of runs."""
