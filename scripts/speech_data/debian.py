"""Files out of Debian packages, on any system: a .deb is an `ar` archive with a tar archive in it."""

import io
import re
import shutil
import subprocess
import tarfile
from pathlib import Path


_MAGIC = b"!<arch>\n"


def find_packages(names: list[str], folder: Path | None, download_to: Path) -> dict[str, Path]:
    """The .deb file of each package.

    Args:
        names: Of packages.
        folder (`Path`, *optional*): Where they lie already. Without it they are downloaded by `apt-get`.
        download_to (`Path`): Folder for what is downloaded.

    Raises:
        FileNotFoundError: `folder` lacks some, or there is no apt-get.
        OSError: apt-get could not get one.
    """
    if folder is None:
        if shutil.which("apt-get") is None:
            raise FileNotFoundError(
                "There is no apt-get here. Download the Debian packages "
                f"{', '.join(names)} elsewhere (`apt-get download`) and pass their folder as --debs."
            )
        result = subprocess.run(["apt-get", "download", *names], cwd=download_to, capture_output=True, text=True)
        if result.returncode:
            raise OSError(
                f"apt-get could not download {', '.join(names)}: {result.stderr.strip().splitlines()[-1:]} "
                "Run `apt-get update` first, or pass a folder of .deb files as --debs."
            )
        folder = download_to
    elif not folder.is_dir():
        raise FileNotFoundError(f"--debs: there is no folder {str(folder)!r}.")
    found = {name: sorted(folder.glob(f"{name}_*.deb")) for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise FileNotFoundError(f"{folder} has no .deb file of {', '.join(missing)} (NAME_VERSION_all.deb).")
    return {name: files[-1] for name, files in found.items()}


def package_version(path: Path) -> str:
    """`1.6.1-1` of `NAME_1.6.1-1_all.deb`."""
    return path.stem.split("_")[1]


def read_package(path: Path, pattern: str) -> dict[str, bytes]:
    """The regular files of a package whose path matches; nothing is written anywhere.

    Args:
        path (`Path`): A .deb file.
        pattern (`str`): Regular expression that a path such as `usr/share/doc/NAME/copyright` must match whole.

    Raises:
        ValueError: It is no Debian package, is truncated, or is packed in a way that cannot be read here.
    """
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_archive(path)), mode="r:*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and re.fullmatch(pattern, name):
                    files[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    return files


def _data_archive(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError(f"{path} is no Debian package.")
    position = len(_MAGIC)
    while position + 60 <= len(data):
        header = data[position : position + 60]
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58]
        if header[58:] != b"`\n" or not size.strip().isdigit():
            break
        begin, end = position + 60, position + 60 + int(size)
        if name.startswith("data.tar"):
            if end > len(data):
                raise ValueError(f"{path} is truncated: {end} bytes announced, {len(data)} found.")
            return _unpack_zstd(path) if name.endswith(".zst") else data[begin:end]
        position = end + end % 2  # members begin at even places
    raise ValueError(f"{path} is no Debian package, or is truncated: there is no data.tar in it.")


def _unpack_zstd(path: Path) -> bytes:
    """Python reads this compression from 3.14 on only; Debian's own program always does."""
    if shutil.which("dpkg-deb") is None:
        raise ValueError(f"{path} is compressed with zstd, which needs the program dpkg-deb.")
    return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout


__all__ = ["find_packages", "package_version", "read_package"]
