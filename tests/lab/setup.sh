#!/bin/sh
# Fetch the NFS lab's kernel: Debian's package user-mode-linux, unpacked below the lab's cache directory.
#
#   setup.sh            does nothing when the kernel is there already
#   setup.sh --force    fetch it anew
#
# HANDLEFS_LAB_DIR names the cache directory (default: $XDG_CACHE_HOME/handlefs-lab or ~/.cache/handlefs-lab).
# The guest runs the host's own NFS tools: the packages in packages.txt, beside this script, must be installed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
lab=${HANDLEFS_LAB_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/handlefs-lab}
fail() { echo "setup.sh: $*" >&2; exit 1; }

missing=
while read -r package; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done < "$here/packages.txt"
[ -z "$missing" ] || fail "missing packages; run: apt-get install$missing"

if [ "${1:-}" != --force ] && [ -x "$lab/linux.uml" ]; then
    echo "setup.sh: $lab/linux.uml is there already"
    exit 0
fi

mkdir -p "$lab"
new=$(mktemp -d "$lab/new.XXXXXX")     # on the cache's file system, so that the moves below are renames
trap 'rm -rf "$new"' EXIT
# Apt's own sandbox user cannot write below a private directory; say so up front instead of being warned about it.
(cd "$new" && apt-get -q -o APT::Sandbox::User=root download user-mode-linux) ||
    fail "cannot fetch the package user-mode-linux; run apt-get update and try again"
dpkg-deb -x "$new"/user-mode-linux_*.deb "$new"
rm -rf "$lab/modules" "$lab/linux.uml"
mv "$new/usr/lib/uml/modules" "$lab/modules"
mv "$new/usr/bin/linux.uml" "$lab/linux.uml"     # last: its presence says that the set-up is complete
echo "setup.sh: installed $lab/linux.uml, kernel $(ls "$lab/modules")"
