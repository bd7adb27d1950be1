#!/bin/bash
# Process 1 of the NFS lab's guest, started by lab.py; it must never run on a host.
#
# "/" is the host's root file system, read-only. Below /etc /tmp /var /root /home the guest sees the host's content and
# its own writes, which go to a tmpfs. /mnt is a tmpfs that holds the scratch file systems (/mnt/ext4 ...). It is also the
# root of the NFSv4 name space, as hostfs cannot be exported.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
[ $$ = 1 ] || { echo "init.sh: not process 1" >&2; exit 1; }
: "${lab_run:?}"     # the run directory, from the kernel's command line
# shellcheck source=/dev/null
. "$lab_run/config"
: "${LAB_PYTHON:?}" "${LAB_MODULES:?}" "${LAB_TIMEOUT:?}"

finish() {     # finish STATUS: report it and power off; the scratch disks are thrown away, so no sync
    echo "$1" > "$lab_run/status"
    "$LAB_PYTHON" -c 'import ctypes, termios
for tty in "/dev/ttyS0", "/dev/ttyS1": termios.tcdrain(open(tty))
ctypes.CDLL(None).reboot(0x4321fedc)'
    echo o > /proc/sysrq-trigger
}
fail() { echo "init.sh: $*" > /dev/console; finish 125; sleep infinity; }
show_hidden() {     # show the checkout, the Python environment and the modules where a mount made here hides them
    while read -r dir; do
        [ -d "$dir" ] && continue
        mkdir -p "$dir"
        mount -t hostfs -o "ro,$dir" host "$dir" || fail "cannot show $dir"
    done < "$lab_run/visible"
}
writable() {     # writable DIR: the host's DIR, with a tmpfs for what the guest writes
    mkdir -p "/run/overlay$1/upper" "/run/overlay$1/work"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=/run/overlay$1/upper,workdir=/run/overlay$1/work" "$1" ||
        fail "overlay on $1"
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2> /dev/null     # the kernel may have mounted it
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
ln -sfT /proc/self/fd /dev/fd
exec > /dev/console 2>&1
show_hidden

mkdir -p /run/modules/lib/modules
ln -s "$LAB_MODULES" "/run/modules/lib/modules/$(uname -r)"
for module in overlay fuse sunrpc auth_rpcgss nfsd nfs nfsv3 nfsv4; do
    modprobe -d /run/modules "$module" || fail "no module $module below $LAB_MODULES"
done

mkdir -p /run/host
mount -t hostfs host /run/host -o "$lab_run" || fail "hostfs on $lab_run"
for dir in /etc /tmp /var /root /home; do [ ! -d "$dir" ] || writable "$dir"; done
mount -t tmpfs -o mode=755 mnt /mnt
mkdir -p "$lab_run"
mount --move /run/host "$lab_run"     # the one place that the guest writes to on the host
show_hidden

mount -t tmpfs -o mode=755 nfs /var/lib/nfs
mkdir -p /var/lib/nfs/sm /var/lib/nfs/sm.bak /var/lib/nfs/v4recovery /var/lib/nfs/nfsdcld
touch /var/lib/nfs/etab /var/lib/nfs/rmtab /var/lib/nfs/state
rm -rf /etc/exports /etc/exports.d /etc/mtab /etc/nfs.conf /etc/nfs.conf.d
touch /etc/exports /etc/nfs.conf     # Debian's makes the server look groups up in /etc/group, where the tests' users are not
ln -s /proc/self/mounts /etc/mtab
echo '127.0.0.1 localhost guest' > /etc/hosts
hostname guest
mount -t nfsd nfsd /proc/fs/nfsd
mkdir -p /run/rpc_pipefs
mount -t rpc_pipefs sunrpc /run/rpc_pipefs
mount -t fusectl fusectl /sys/fs/fuse/connections 2> /dev/null     # modprobe's rules may have mounted it
ip link set lo up || fail "no loopback interface"

while read -r fs device; do
    mkdir -p "/mnt/$fs"
    mount -t "$fs" "$device" "/mnt/$fs" || fail "cannot mount $fs from $device"
done < "$lab_run/disks"

# ttyS0 carries the command's output, ttyS1 what it writes to file descriptor 3.
for tty in /dev/ttyS0 /dev/ttyS1; do stty raw -echo < "$tty"; done
cd "$LAB_CWD" || fail "no directory $LAB_CWD"
export HOME=/root HANDLEFS_LAB_GUEST=1
setsid timeout -k 5 "$LAB_TIMEOUT" /bin/bash "$lab_run/command" < /dev/null > /dev/ttyS0 2>&1 3> /dev/ttyS1
status=$?
if [ $status -ge 124 ]; then     # timed out or killed: say what everybody is waiting for
    echo "init.sh: the command ended with status $status; blocked tasks:"
    echo 9 > /proc/sys/kernel/printk
    echo w > /proc/sysrq-trigger
fi
finish $status
