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
    write("Differences and rounding noise are of logits, relative to their range; `own loop` is mlx-lm's generate_step.")
    columns = ["models", "form", "split", "runs", "same tokens", "fewest", "difference", "noise", "own loop: fewest"]
    widths = [8, 15, 10, 5, 12, 7, 11, 9, 16]

    def row(cells):
        write("  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip())

    row(columns)
    for (kind, form, split), found in table.items():
        same, own_loop, noise = zip(*found)
        whole = sum(a.equal == a.steps for a in same)
        row([kind, form, split, len(found), f"{whole} of {len(found)}", min(a.equal for a in same),
             f"{max(a.difference for a in same):.1e}", f"{max(noise):.1e}", min(a.equal for a in own_loop)])
