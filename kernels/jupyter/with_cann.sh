#!/usr/bin/env bash
# with_cann.sh SET_ENV COMMAND...: COMMAND with CANN's variables, for a kernel whose notebooks call CANN's own tools.
# The kernel itself still loads no torch_npu and holds no device: see kernel.json.
set -eo pipefail
if [ ! -r "$1" ]; then
    echo "error: $1 is not there: install CANN, or make the kernel again without --cann." >&2
    exit 1
fi
set +u # set_env.sh reads variables that may be unset
. "$1"
shift
exec "$@"
