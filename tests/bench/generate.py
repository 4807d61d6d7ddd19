"""Launches in any number: the sample's, varied.

    python tests/bench/generate.py 100000 launches.json

Each launch is one of the sample's with ids, dates, texts and links of its own, and with as many
photos as keeps it at the 2.1 kB that a launch of the API has. The same number gives the same file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from string import ascii_letters, digits
from typing import Any

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "launches.json"
FIRST = datetime(2006, 3, 24, 22, 30, tzinfo=UTC)
PHOTO = "https://live.staticflickr.com/65535/{}_{:010x}_o.jpg"


def launches(rows: int) -> Iterator[dict[str, Any]]:
    """Yields this many launches."""
    sample = json.loads(SAMPLE.read_bytes())
    words = [w for launch in sample for w in (launch["details"] or "").split(" ") if w]
    random = Random(0)  # fixed, so that everybody measures the same
    for number in range(1, rows + 1):
        yield varied(random.choice(sample), number, words, random)


def varied(launch: dict[str, Any], number: int, words: list[str], random: Random) -> dict[str, Any]:
    """The launch with values of its own; what is null or empty stays so."""
    date = FIRST + timedelta(seconds=random.randrange(20 * 365 * 86_400))
    zone = datetime.fromisoformat(launch["date_local"]).tzinfo
    fired = date - timedelta(hours=random.randrange(24, 240))
    new = {
        "id": f"{number:08x}{random.getrandbits(64):016x}",
        "flight_number": number,
        "name": f"{launch['name']} {number}",
        "date_utc": api_time(date),
        "date_unix": int(date.timestamp()),
        "date_local": date.astimezone(zone).isoformat(),
        "static_fire_date_utc": launch["static_fire_date_utc"] and api_time(fired),
        "static_fire_date_unix": launch["static_fire_date_unix"] and int(fired.timestamp()),
        "details": launch["details"] and " ".join(random.choices(words, k=random.randint(5, 90))),
        "links": links(launch["links"], random),
        "cores": [
            core | {"core": core["core"] and hex_id(random), "flight": random.randint(1, 15)}
            for core in launch["cores"]
        ],
        "crew": [member | {"crew": hex_id(random)} for member in launch["crew"]],
    }
    for field in ("ships", "capsules", "payloads"):
        new[field] = [hex_id(random) for _ in launch[field]]
    return launch | new


def links(old: dict[str, Any], random: Random) -> dict[str, Any]:
    """A launch's links, each to something else, and photos."""
    video = "".join(random.choices(ascii_letters + digits, k=11))
    new = {
        name: f"{link}?{random.getrandbits(24):06x}" if isinstance(link, str) else link
        for name, link in old.items()
    }
    photos = [
        PHOTO.format(random.randrange(10**10, 10**11), random.getrandbits(40))
        for _ in range(int(random.expovariate(1 / 6)))
    ]
    return new | {
        "webcast": old["webcast"] and f"https://www.youtube.com/watch?v={video}",
        "youtube_id": old["youtube_id"] and video,
        "patch": {
            size: link and f"https://images2.imgbox.com/{random.getrandbits(64):016x}_o.png"
            for size, link in old["patch"].items()
        },
        "flickr": {"small": [], "original": photos},
    }


def hex_id(random: Random) -> str:
    """An id as the API has them: 24 hexadecimal digits."""
    return f"{random.getrandbits(96):024x}"


def api_time(moment: datetime) -> str:
    """A moment as the API writes it."""
    return f"{moment:%Y-%m-%dT%H:%M:%S}.000Z"


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes the records as a JSON array, one a line; the file appears when it is complete."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        before = "[\n"
        for record in records:
            file.write(before + json.dumps(record, ensure_ascii=False, separators=(",", ":")))
            before = ",\n"
        file.write("\n]\n")
    unfinished.rename(path)


if __name__ == "__main__":
    write(Path(sys.argv[2]), launches(int(sys.argv[1])))
