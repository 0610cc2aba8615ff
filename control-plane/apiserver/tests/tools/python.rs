//! The official Python client (`kubernetes` on PyPI) against the server. What it does is in
//! `client.py` beside this file.

use std::{path::Path, process::Stdio, time::Duration};

use exo_apiserver::collect_garbage;
use tokio::{process::Command, time::timeout};

use crate::{serve, support};

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_works() {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = crate_dir.join("../../.venv/bin/python");
    let import = Command::new(&python).args(["-c", "import kubernetes"]).output().await;
    if !import.is_ok_and(|output| output.status.success()) {
        assert!(std::env::var_os("CI").is_none(), "the Python client is missing in CI");
        eprintln!("there is no Python client here: nothing is tested");
        return;
    }
    let server = support::start();
    tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    let (address, _) = serve::listen(server.router.clone()).await;
    let output = Command::new(python)
        .arg(crate_dir.join("tests/tools/client.py"))
        .arg(format!("http://{address}"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(Duration::from_secs(120), output).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}
