#!/bin/sh
# make run: mount an image through fusewire, show it, and say how to go on.   demo.sh FUSEWIRE IMAGE MNT
set -eu
fusewire=$1 image=$2 mnt=$3

if [ "$image" = demo.img ] && [ ! -e demo.img ]; then
    command -v mkfs.ext4 >/dev/null || { echo "fusewire: mkfs.ext4 is missing (Debian package e2fsprogs)" >&2; exit 1; }
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    mkdir -p "$tree/letters" "$tree/pictures/2026"
    echo 'Served from user space, with no kernel ext4 in between.' > "$tree/README.txt"
    for letter in a b c d; do printf '%s\n' "This is the letter $letter." > "$tree/letters/$letter.txt"; done
    ln -s ../README.txt "$tree/letters/readme"
    truncate -s 1M "$tree/pictures/2026/sparse.raw"
    truncate -s 32M demo.img
    mkfs.ext4 -q -F -L demo -d "$tree" demo.img
    echo "fusewire: made demo.img, a small ext4 image"
fi

if mountpoint -q "$mnt"; then
    echo "fusewire: $mnt is mounted already; unmount it first: $fusewire umount $mnt" >&2
    exit 1
fi
mkdir -p "$mnt"
"$fusewire" mount "$image" "$mnt"
echo
echo "\$ ls -l $mnt"
ls -l "$mnt"
echo
echo "$image is mounted at $mnt. Look further:"
echo "    find $mnt            everything in it"
echo "    stat -f $mnt         its figures"
echo "    $fusewire info $image"
echo "and when you are done:"
echo "    $fusewire umount $mnt"
