def pytest_addoption(parser):
    parser.addoption("--full", action="store_true",
                     help="every architecture in every packed form and split on three seeds, not a sample of them")


def pytest_generate_tests(metafunc):
    if "family_case" in metafunc.fixturenames:
        from test_families import cases

        chosen = cases(metafunc.config.getoption("full"))
        metafunc.parametrize("family_case", chosen, ids=map(str, chosen))


def pytest_terminal_summary(terminalreporter, config):
    from test_families import TABLE

    table = config.stash.get(TABLE, None)
    if not table:
        return
    write = terminalreporter.write_line
    terminalreporter.section("agreement with mlx-lm")
    write("Fewest equal tokens, largest differences. Differences and rounding noise are of logits, relative to their range.")
    write("`own loop`: with mlx-lm's generate_step, which feeds the last token of a prompt alone; `mlx-lm, both ways`:")
    write("how far mlx-lm agrees with itself when it feeds the prompt at once and in that way; `its team`: with mlx-lm's")
    write("own tensor parallel mode.")
    columns = ["models", "form", "split", "runs", "all equal", "fewest", "difference", "noise", "own loop",
               "mlx-lm, both ways", "its team"]
    widths = [8, 15, 10, 5, 10, 7, 11, 9, 9, 17, 8]

    def row(cells):
        write("  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip())

    row(columns)
    for (kind, form, split), found in table.items():
        same, own_loop, both_ways, as_team, noise = zip(*found)
        as_team = [a for a in as_team if a]
        fewest = [min((a.equal for a in some), default="") for some in (same, own_loop, both_ways, as_team)]
        row([kind, form, split, len(found), sum(a.equal == a.steps for a in same), fewest[0],
             f"{max(a.difference for a in same):.1e}", f"{max(noise):.1e}", *fewest[1:]])
