#!/bin/sh
# Train one fold; `sh train.sh` explains.
exec sh "$(dirname "$0")/util/launch.sh" train "$@"
