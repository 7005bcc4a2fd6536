"""The table of versions for the documentation, made of results.json."""

from __future__ import annotations

import json
import sys

from docs import generated
from tests.compat.check import RESULTS


def pages() -> generated.Pages:
    """The generated page: a row for each environment that `make compat` has tried."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")).values()
    lines = [
        "| torch | transformers | passed | skipped | failed | date |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        failed = len(row["failed"])
        lines.append(
            f"| {row['torch']} | {row['transformers']} | {row['passed']} | {row['skipped']} | {failed} "
            f"| {row['date']} |"
        )
    for row in rows:
        for test, why in row.get("explained", {}).items():
            name = test.rpartition("::")[2]
            lines.append(f"\n- torch {row['torch']}, transformers {row['transformers']}: `{name}` {why}.")
    return {"compat": "\n".join(lines)}


if __name__ == "__main__":
    sys.exit(generated.run(pages, generated.parser(__doc__).parse_args()))
