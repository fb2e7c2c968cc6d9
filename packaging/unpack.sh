#!/bin/sh
# Ollama Distributed @VERSION@ for Linux on @MACHINE@, in one file; by the name ollama-dist it is the
# command line. The first start unpacks it, once for each version and user; later ones do not.
# OLLAMAD_UNPACK_DIR says where; else it is the service's cache directory, /var/cache/ollamad-root
# for root, or ~/.cache/ollamad. What is unpacked can be deleted whenever nothing of it runs.
set -eu
fail() {
    echo "ollamad: $1" >&2
    exit 1
}
base=${OLLAMAD_UNPACK_DIR:-${CACHE_DIRECTORY:-}}
if [ -z "$base" ]; then
    # Root's HOME may be somebody else's, and what is there is started.
    if [ "$(id -u)" = 0 ]; then base=/var/cache/ollamad-root
    else base=${XDG_CACHE_HOME:-${HOME:?set HOME or OLLAMAD_UNPACK_DIR}/.cache}/ollamad; fi
fi
home=$base/@ID@
theirs="$base belongs to somebody else; set OLLAMAD_UNPACK_DIR to a directory of yours"
if [ ! -e "$home/complete" ]; then
    umask 077
    full="cannot unpack to $base: free @MEGABYTES@ MB there, or set OLLAMAD_UNPACK_DIR"
    case $(tail -c +@OFFSET@ "$0" | sha256sum) in
        @ID@*) ;;
        *) fail "$0 is damaged or cut off; copy it again" ;;
    esac
    mkdir -p "$base" || fail "$full"
    [ -O "$base" ] || fail "$theirs"
    # What a start left behind that was killed. What goes meanwhile is another start's, and no harm.
    find "$base" -maxdepth 1 -name 'unpacking-*' -mmin +60 -exec rm -rf {} + 2> /dev/null || :
    new=$(mktemp -d "$base/unpacking-XXXXXX") || fail "$full"
    trap 'rm -rf "$new" "$new.old"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    tail -c +@OFFSET@ "$0" | gzip -dc | tar -x -f - -C "$new" --no-same-owner || fail "$full"
    # Complete is what is still there after the power has failed.
    sync -f "$new"
    : > "$new/complete"
    # From here on one start at a time, where the disk can lock.
    exec 9< "$base"
    flock 9 2> /dev/null && locked=yes || locked=
    # Somebody else may have been quicker; both are the same.
    if ! mv -T "$new" "$home" 2> /dev/null && [ ! -e "$home/complete" ]; then
        # It is what a deletion has left that was cut off. Nobody completes it: we have the lock.
        if [ ! "$locked" ] || ! mv -T "$home" "$new.old" || ! mv -T "$new" "$home"; then
            fail "$home is there in part and cannot be replaced; delete it and start again"
        fi
    fi
    exec 9<&-
    rm -rf "$new" "$new.old"
    trap - EXIT INT TERM
fi
[ -O "$base" ] && [ -O "$home" ] || fail "$theirs"
[ -x "$home/ollamad" ] || fail "programs in $base must not run (noexec?); set OLLAMAD_UNPACK_DIR"
case ${0##*/} in
    ollama-dist*) exec "$home/ollama-dist" "$@" ;;
    *) exec "$home/ollamad" "$@" ;;
esac
