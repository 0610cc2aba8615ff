def pytest_addoption(parser):
    parser.addoption("--full", action="store_true",
                     help="every architecture in every packed form and split, not a sample of them")


def pytest_generate_tests(metafunc):
    if "family_case" in metafunc.fixturenames:
        from test_families import cases

        chosen = cases(metafunc.config.getoption("full"))
        metafunc.parametrize("family_case", chosen, ids=map(str, chosen))
