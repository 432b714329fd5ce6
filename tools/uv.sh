#!/usr/bin/env bash
# uv, told where pip gets its packages: uv reads neither pip.conf nor PIP_*, and whoever needs an index or a
# certificate of their own has mostly told pip alone. What uv itself has been told comes first.
set -euo pipefail
bin=$(dirname "${BASH_SOURCE[0]}")/../.venv/setup/bin

# `pip config get` reads one file only, `list` reads all that count. What stands under [install] goes before [global].
pip_setting() {
    for section in install global; do sed -n "s/^$section\.$1='\(.*\)'\$/\1/p" <<<"$settings"; done | head -1
}

if [[ -z ${UV_DEFAULT_INDEX:-} ]]; then
    settings=$("$bin/pip" --disable-pip-version-check config list 2>/dev/null) || settings=
    index=${PIP_INDEX_URL:-$(pip_setting index-url)}
    cert=${PIP_CERT:-$(pip_setting cert)}
    [[ -z $index ]] || export UV_DEFAULT_INDEX=$index
    [[ -z $cert ]] || export SSL_CERT_FILE=$cert
fi
exec "$bin/uv" "$@"
