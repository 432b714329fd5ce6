#!/usr/bin/env bash
# Is there room for what `make` will install? One line, before anything is fetched.
set -euo pipefail
environment_gb=9
model_gb=3 # while it is converted

free_gb() { df --output=avail -BG "$1" | tail -1 | tr -dc 0-9; }

# What a setup that was cut short has installed is not installed again.
done_gb=0
[[ ! -d .venv/lib ]] || done_gb=$(du -s -BG .venv/lib | tr -dc '0-9\t' | cut -f 1)
missing_gb=$((done_gb < environment_gb ? environment_gb - done_gb : 0))

wanted_gb=$((missing_gb + model_gb))
found_gb=$(free_gb .)
if ((found_gb < wanted_gb)); then
    echo "setup: wanted ${wanted_gb} GB free (environment ${missing_gb} GB, model ${model_gb} GB), found ${found_gb} GB" >&2
    exit 2
fi

# On another filesystem uv's cache cannot share its files with the environment, so they take their room twice.
cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/uv}
place=$cache
until [[ -e $place ]]; do place=$(dirname "$place"); done
if [[ $(stat -c %d "$place") != $(stat -c %d .) ]]; then
    cache_gb=$(free_gb "$place")
    if ((cache_gb < missing_gb)); then
        echo "setup: wanted ${missing_gb} GB free for uv's cache $cache (UV_CACHE_DIR moves it), found ${cache_gb} GB" >&2
        exit 2
    fi
fi
echo "setup: needs about ${wanted_gb} GB of disk, ${found_gb} GB are free"
