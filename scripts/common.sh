# shellcheck shell=sh
# What the scripts share; sourced with `top` set to the directory that holds pyproject.toml.
: "${top:?}"

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}
quietly() { # quietly COMMAND...: its output is shown only when it fails
    _log=$(mktemp)
    if "$@" > "$_log" 2>&1 < /dev/null; then
        rm -f "$_log"
    else
        _status=$?
        cat "$_log" >&2
        rm -f "$_log"
        return "$_status"
    fi
}
need_root() { [ "$(id -u)" = 0 ] || die "this needs root: try  sudo $0"; }

names() { sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$@"; } # the entries of package lists

missing_packages() { # missing_packages NAME...
    for _package; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$_package" 2> /dev/null) in
            installed) ;;
            *) printf '%s ' "$_package" ;;
        esac
    done
}

apt() { DEBIAN_FRONTEND=noninteractive quietly apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"; }

policy=/usr/sbin/policy-rc.d
denied=
deny_daemons() { # packages must not start daemons here; a policy that the administrator has set stays
    [ ! -e "$policy" ] || return 0
    denied=yes
    trap 'allow_daemons' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
}
allow_daemons() {
    [ -n "$denied" ] || return 0
    rm -f "$policy"
    denied=
    trap - EXIT INT TERM HUP
}

install_packages() { # install_packages LIST...: what these lists name and is not there yet
    # shellcheck disable=SC2046  # words are what is wanted
    set -- $(names "$@" | sort -u)
    if ! command -v apt-get > /dev/null || ! command -v dpkg-query > /dev/null; then
        say "No apt-get here: install what these Debian packages hold yourself, if it is not there: $*"
        return 0
    fi
    # shellcheck disable=SC2046
    set -- $(missing_packages "$@")
    [ $# -gt 0 ] || return 0
    need_root
    say "Installing $*"
    deny_daemons
    if ! apt-get -q -y install --no-install-recommends --simulate "$@" > /dev/null 2>&1; then
        apt update || die "apt-get update failed; see above"
    fi
    apt install --no-install-recommends "$@" ||
        { say "Once more, with fresh package lists"; apt update && apt install --no-install-recommends "$@"; } ||
        die "apt-get could not install: $*"
    allow_daemons
}

# A Python is usable when it is new enough and can make virtual environments and build extensions.
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 < /dev/null; }
usable() {
    recent "$1" && "$1" -c '
import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' > /dev/null 2>&1 < /dev/null
}
find_python() { # the command of the first usable Python
    for _python in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if usable "$_python"; then
            command -v "$_python"
            return 0
        fi
    done
    return 1
}
# shellcheck disable=SC2034  # for the scripts
ensure_python() { # sets `python`
    python=$(find_python) && return 0
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not Python 3.11 or newer with its venv module and headers"
    install_packages "$top/scripts/packages-python.txt"
    python=$(find_python) || die "handlefs needs Python 3.11 or newer with its venv module and headers, and found $(
        python3 --version 2>&1 || :). Debian 12 has it; elsewhere install one and say PYTHON=/path/to/python3.12 $0"
}

make_venv() { # make_venv DIR PYTHON: a virtual environment with a pip that works; one that is broken is made anew
    if ! recent "$1/bin/python" || ! "$1/bin/python" -m pip --version > /dev/null 2>&1; then
        quietly "$2" -m venv --clear "$1" || die "$2 could not make a virtual environment in $1"
    fi
}
pip_install() { # pip_install VENV ARGS...
    _venv=$1
    shift
    quietly "$_venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" ||
        die "pip could not install $*: see above"
}
# All that the installed package is made from.
package_files() {
    find handlefs docs/handlefs.8 systemd pyproject.toml setup.py README.md LICENSE -type f ! -name '*.py[co]' ! -name '*.so'
}
fingerprint() { (cd "$top" && package_files | sort | xargs cksum | cksum); }
install_package() { # install_package VENV: built in a copy, which holds nothing of an earlier build and leaves nothing here
    _copy=$(mktemp -d)
    (cd "$top" && package_files | tar -c -f - -T -) | tar -x -f - -C "$_copy"
    pip_install "$1" --upgrade "$_copy"
    rm -rf "$_copy"
}
ensure_fuse() {
    [ -c /dev/fuse ] || modprobe fuse 2> /dev/null || :
    [ -c /dev/fuse ] || die "this kernel has no /dev/fuse: load its module (modprobe fuse); a container needs the device"
}
