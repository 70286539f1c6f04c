#!/bin/sh
# Gets TinyImageNet-200 (248 MB) and unpacks it as tiny-imagenet-200/ beside this script, or in another folder:
#     sh data/get_tinyimagenet.sh [FOLDER]
# Needs curl or wget, and Python 3 (PYTHON names another than python3). A download that was cut off goes on where it
# stopped when this is called again; a tiny-imagenet-200.zip put there by hand is taken. The archive is kept.
# TINYIMAGENET_URL names another place to get it from, TINYIMAGENET_MD5 the checksum of another archive.
set -eu
name=tiny-imagenet-200
url=${TINYIMAGENET_URL:-http://cs231n.stanford.edu/$name.zip}
md5=${TINYIMAGENET_MD5:-90528d7ca1a48142e341f4ef8d21d0de}
python=${PYTHON:-python3}

fail() {
    echo "get_tinyimagenet.sh: $*" >&2
    exit 2
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# The file is there and has the checksum.
right() {
    [ -f "$1" ] && "$python" - "$1" "$md5" <<'END'
import hashlib, sys
found = hashlib.md5()
with open(sys.argv[1], "rb") as file:
    for block in iter(lambda: file.read(1 << 20), b""):
        found.update(block)
sys.exit(found.hexdigest() != sys.argv[2])
END
}

# Goes on after what is there of the file. Progress and the programs' own messages are for terminals.
fetch() {
    if has curl; then
        [ -t 2 ] && quiet= || quiet=-s
        curl $quiet -fL -C - -o "$1" "$url" && return
        case $? in
            22 | 33) curl $quiet -fL -o "$1" "$url" ;;  # the server cannot go on there: from the start
            *) return 1 ;;
        esac
    else
        [ -t 2 ] && quiet= || quiet=-q
        wget $quiet -c -O "$1" "$url"
    fi
}

# Refuses, before anything is written, a member that leads out of the folder.
unpack() {
    "$python" - "$1" "$2" <<'END'
import sys, zipfile
archive, folder = sys.argv[1:]
try:
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            if member.startswith("/") or "\\" in member or ".." in member.split("/"):
                sys.exit(f"get_tinyimagenet.sh: {archive} is not unpacked: its member {member} leads out of the folder")
        file.extractall(folder)
except (OSError, zipfile.BadZipFile) as error:
    sys.exit(f"get_tinyimagenet.sh: {archive} cannot be unpacked ({error})")
END
}

case $#:${1:-} in
    0: | 1:[!-]*) folder=${1:-$(dirname "$0")} ;;
    *) fail "usage: sh data/get_tinyimagenet.sh [FOLDER]" ;;
esac
archive=$folder/$name.zip
if [ -f "$folder/$name/wnids.txt" ]; then
    echo "$folder/$name is there already"
    exit 0
fi
[ ! -e "$folder/$name" ] || fail "$folder/$name is there, but has no wnids.txt: move it away and call again"
has "$python" || fail "Python 3 is needed, and there is no $python"
{ mkdir -p "$folder" && [ -w "$folder" ]; } 2>/dev/null || fail "the folder $folder cannot be made or written"

if ! right "$archive"; then
    if ! right "$archive.part"; then
        has curl || has wget || fail "curl or wget is needed to get $url (or put it at $archive by other means)"
        echo "getting $url"
        fetch "$archive.part" || fail "$url could not be fetched to the end; call again to go on where it stopped"
        right "$archive.part" || { rm -f "$archive.part"; fail "what came from $url has not the MD5 $md5: thrown away"; }
    fi
    mv -f "$archive.part" "$archive"
fi

partial=$folder/.$name.$$
trap 'rm -rf "$partial"' EXIT
trap 'exit 130' HUP INT TERM
echo "unpacking $archive"
mkdir "$partial"
unpack "$archive" "$partial" || exit 2
[ -f "$partial/$name/wnids.txt" ] || fail "$archive holds no $name/wnids.txt"
mv "$partial/$name" "$folder/$name"
echo "$folder/$name is complete: --dataset tinyimagenet --data_folder $folder"
