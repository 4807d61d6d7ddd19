"""Launches in any number: the sample's, varied.

    python tests/bench/generate.py 100000 launches.json

Each launch is one of the sample's with ids, dates, texts and links of its own, and with as many
photos as keeps it at the 2.1 kB that a launch of the API has. The same number gives the same file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "launches.json"
FIRST = datetime(2006, 3, 24, 22, 30, tzinfo=UTC)
TIME = "%Y-%m-%dT%H:%M:%S.000Z"
PHOTO = "https://live.staticflickr.com/65535/{}_{}_o.jpg"


def launches(rows: int) -> Iterator[dict[str, Any]]:
    """Yields this many launches."""
    sample = json.loads(SAMPLE.read_bytes())
    words = " ".join(launch["details"] or "" for launch in sample).split()
    records = list(map(json.dumps, sample))
    random = Random(0)  # fixed, so that everybody measures the same
    for number in range(1, rows + 1):
        yield varied(random.choice(records), number, words, random)


def varied(text: str, number: int, words: list[str], random: Random) -> dict[str, Any]:
    """The launch with values of its own; what is null or empty stays so."""

    def digits(count: int) -> str:
        return f"{random.getrandbits(4 * count):0{count}x}"

    an_id = r'(?<!"rocket": )(?<!"launchpad": )"[0-9a-f]{24}"'
    text = re.sub(an_id, lambda _: f'"{digits(24)}"', text)
    text = re.sub(r"https?://[^\"]+", lambda found: f"{found[0][:-6]}{digits(6)}", text)
    launch = json.loads(text)
    date = FIRST + timedelta(seconds=random.randrange(20 * 365 * 86_400))
    zone = datetime.fromisoformat(launch["date_local"]).tzinfo
    fired = date - timedelta(hours=random.randrange(24, 240))
    photos = range(int(random.expovariate(1 / 6)))
    launch["links"]["flickr"]["original"] = [PHOTO.format(digits(10), digits(10)) for _ in photos]
    return launch | {
        "id": f"{number:08x}{digits(16)}",
        "flight_number": number,
        "name": f"{launch['name']} {number}",
        "date_utc": f"{date:{TIME}}",
        "date_unix": int(date.timestamp()),
        "date_local": date.astimezone(zone).isoformat(),
        "static_fire_date_utc": launch["static_fire_date_utc"] and f"{fired:{TIME}}",
        "static_fire_date_unix": launch["static_fire_date_unix"] and int(fired.timestamp()),
        "details": launch["details"] and " ".join(random.choices(words, k=random.randint(5, 90))),
    }


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
