#!/bin/sh
# Evaluate a trained fold; `sh test.sh` explains.
exec sh "$(dirname "$0")/util/launch.sh" test "$@"
