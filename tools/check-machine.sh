#!/usr/bin/env bash
# Can what requirements.lock names run here? One line where not. Usage: check-machine.sh PYTHON
set -euo pipefail
python=$1

refuse() {
    echo "setup: wanted $1, found $2" >&2
    exit 2
}

system="$(uname -s) $(uname -m)"
[[ $system == "Linux x86_64" ]] || refuse "Linux on x86_64 (requirements.lock is for that alone)" "$system"

libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || refuse "glibc 2.34 or newer" "another C library"
oldest=$(printf '%s\n' 2.34 "${libc#glibc }" | sort -V | head -1)
[[ $oldest == 2.34 ]] || refuse "glibc 2.34 or newer" "$libc"

command -v "$python" >/dev/null || refuse "Python 3.11 (set PYTHON=…)" "no ${python:-python3.11 or python3}"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version="one that does not run"
[[ $version == 3.11 ]] || refuse "Python 3.11 (set PYTHON=…)" "$version as $python"
"$python" -c 'import ensurepip, venv' 2>/dev/null || refuse "Python 3.11 with venv (a package such as python3.11-venv)" "$python without"
