def pytest_addoption(parser):
    parser.addoption("--full", action="store_true",
                     help="every architecture in every packed form and split on three seeds, not a sample of them")
    parser.addoption("--results", metavar="FILE",
                     help="append what each of these finds to FILE, a JSON object a line; report.py sums such files up")


def pytest_generate_tests(metafunc):
    if "family_case" in metafunc.fixturenames:
        from test_families import cases

        chosen = cases(metafunc.config.getoption("full"))
        metafunc.parametrize("family_case", chosen, ids=map(str, chosen))


def pytest_terminal_summary(terminalreporter, config):
    from test_families import RESULTS

    results = config.stash.get(RESULTS, None)
    if results and results.rows:
        terminalreporter.section("agreement with mlx-lm")
        for line in results.summary():
            terminalreporter.write_line(line)
