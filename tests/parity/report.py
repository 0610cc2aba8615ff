"""Sums up what test_families.py found: `report.py FILE...`, of what `--results` wrote. A case's last line counts."""

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict

EXPLANATION = """\
Fewest equal tokens of 17, and largest differences of logits, relative to their range. `one rank`: against mlx-lm on one
rank. `team`: 16-bit values in tensor parallel, against mlx-lm's own tensor parallel mode at each step, fed the same
tokens; `first`: how many differ by rounding at the first step, which the summing order of more than two ranks allows.
`noise`: how far rounding in 16 bits moves mlx-lm's own logits."""
COLUMNS = ["", "cases", "failed", "| one rank: all equal", "fewest", "difference",
           "| team: cases", "fewest", "difference", "first", "noise"]


class Results:
    """One row per case; written to the file `path`, if any, as they come."""

    def __init__(self, path=None):
        self.rows = []
        self.file = open(path, "a") if path else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            self.file.close()

    @contextmanager
    def case(self, case, made):
        """Gives the row of a case, to be filled with what is found, and notes whether all went well."""
        row = asdict(case) | {"same": None, "team": [], "noise": made.noise, "own_noise": made.own_noise,
                              "both_ways": asdict(made.both_ways), "failed": None}
        try:
            yield row
        except (AssertionError, RuntimeError) as error:
            row["failed"] = str(error)[:500]
            raise
        finally:
            self.rows.append(row)
            if self.file:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()

    def summary(self):
        yield from EXPLANATION.splitlines()
        for key in ("family", "form", "split"):
            yield ""
            groups = {}
            for row in self.rows:
                groups.setdefault(row[key], []).append(row)
            yield from table([[key, *COLUMNS[1:]], *([name, *sums(rows)] for name, rows in groups.items()),
                              ["all", *sums(self.rows)]])


def sums(rows):
    strict = [row["same"] for row in rows if row["same"] and not row["team"]]
    teams = [row for row in rows if row["team"]]
    # The first step of a team has a column of its own where it is off by rounding.
    later = [step for row in teams for step in row["team"][1:]]
    off = [row for row in teams if not row["team"][0]["equal"] or row["team"][0]["difference"] > 1e-3]
    cells = [len(rows), sum(bool(row["failed"]) for row in rows)]
    cells += [sum(a["equal"] == a["steps"] for a in strict), least(a["equal"] for a in strict), most(strict)]
    fewest = least(sum(step["equal"] for step in row["team"]) for row in teams)
    cells += [len(teams) or "", fewest, most(later), len(off) if teams else "", largest(r["noise"] for r in teams)]
    return ["|" + str(cell) if i in (2, 5) else str(cell) for i, cell in enumerate(cells)]


def least(values):
    return min(values, default="")


def most(agreements):
    return largest(a["difference"] for a in agreements)


def largest(values):
    values = list(values)
    return f"{max(values):.1e}" if values else ""


def table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def main():
    results, last = Results(), {}
    for path in sys.argv[1:]:
        for line in open(path):
            row = json.loads(line)
            last[row["family"], row["form"], row["split"], row["seed"]] = row
    results.rows = list(last.values())
    print("\n".join(results.summary()))
    for row in results.rows:
        if row["failed"]:
            print("failed:", *(row[key] for key in ("family", "form", "split", "seed", "failed")))


if __name__ == "__main__":
    main()
