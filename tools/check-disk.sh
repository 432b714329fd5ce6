#!/usr/bin/env bash
# Is there room for what `make` will install? One line, before anything is fetched.
set -euo pipefail
wanted_gb=12
found_gb=$(df --output=avail -BG . | tail -1 | tr -dc 0-9)
if ((found_gb < wanted_gb)); then
    echo "setup: wanted ${wanted_gb} GB free (environment 9 GB, model 1 GB while it is converted), found ${found_gb} GB" >&2
    exit 2
fi
echo "setup: needs about 9 GB of disk, ${found_gb} GB are free"
