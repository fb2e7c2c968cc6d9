#!/bin/sh
# Ollama Distributed @VERSION@ for Linux on @MACHINE@, in one file; by the name ollama-dist it is the
# command line. The first start unpacks it, once for each version and user; later ones do not.
# OLLAMAD_UNPACK_DIR says where; else it is the service's cache, /var/cache/ollamad for root, or
# ~/.cache/ollamad. What is unpacked can be deleted whenever nothing of it runs.
set -eu
base=${OLLAMAD_UNPACK_DIR:-${CACHE_DIRECTORY:-}}
if [ -z "$base" ]; then
    if [ "$(id -u)" = 0 ]; then base=/var/cache/ollamad
    else base=${XDG_CACHE_HOME:-${HOME:?set HOME or OLLAMAD_UNPACK_DIR}/.cache}/ollamad; fi
fi
home=$base/@ID@
if [ ! -e "$home/complete" ]; then
    umask 077
    mkdir -p "$base"
    new=$(mktemp -d "$base/unpacking-XXXXXX")
    trap 'rm -rf "$new"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    tail -c +@OFFSET@ "$0" | gzip -dc | tar -x -f - -C "$new" --no-same-owner || {
        echo "ollamad: cannot unpack to $base: free @MEGABYTES@ MB there, or set OLLAMAD_UNPACK_DIR" >&2
        exit 1
    }
    : > "$new/complete"
    # Somebody else may have been quicker; both are the same.
    mv -T "$new" "$home" 2> /dev/null || [ -e "$home/complete" ]
    rm -rf "$new"
    trap - EXIT INT TERM
fi
if [ ! -O "$home" ]; then
    echo "ollamad: $home belongs to somebody else; set OLLAMAD_UNPACK_DIR to a directory of yours" >&2
    exit 1
fi
case ${0##*/} in
    ollama-dist*) exec "$home/ollama-dist" "$@" ;;
    *) exec "$home/ollamad" "$@" ;;
esac
