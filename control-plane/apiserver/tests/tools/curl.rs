//! curl: another HTTP than that of the clients in Go and Rust.

use axum::http::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{process::Command, time::timeout};

use crate::{
    kubectl::LIMIT,
    serve,
    support::{self, INSTANCES, instance},
};

/// What curl prints; nothing without curl.
async fn curl(args: &[&str]) -> Option<String> {
    let command = Command::new("curl").arg("-sS").args(args).kill_on_drop(true).output();
    let Ok(output) = timeout(LIMIT, command).await.unwrap() else {
        assert!(std::env::var_os("CI").is_none(), "curl is missing in CI");
        eprintln!("there is no curl here: nothing is tested");
        return None;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_refused_in_every_http() {
    let server = support::start();
    let (address, _) = serve::listen(server.router.clone()).await;
    let dir = TempDir::new().unwrap();
    let body = dir.path().join("body");
    std::fs::write(&body, " ".repeat(4_000_000)).unwrap();
    let body = format!("@{}", body.display());
    let url = format!("http://{address}{INSTANCES}");
    for http in ["--http1.1", "--http2-prior-knowledge"] {
        let header = "content-type: application/json";
        let Some(answer) = curl(&[http, "-H", header, "--data-binary", &body, &url]).await else {
            return;
        };
        let status: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(status["reason"], "RequestEntityTooLarge", "{http}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_lists_are_the_same() {
    let server = support::start();
    for n in 0..20 {
        let mut object = instance(&format!("i{n}"));
        let text = format!("{n} ").repeat(4_000);
        object["metadata"]["annotations"] = json!({"text": text});
        server.call(Method::POST, INSTANCES, Some(object)).await;
    }
    let (address, _) = serve::listen(server.router.clone()).await;
    let url = format!("http://{address}{INSTANCES}");
    for http in ["--http1.1", "--http2-prior-knowledge"] {
        let Some(plain) = curl(&[http, &url]).await else {
            return;
        };
        assert!(plain.len() > 128 << 10, "{}", plain.len());
        let size = ["-o", "/dev/null", "-w", "%{size_download}"];
        let packed = curl(&[&[http, "--compressed", &*url], &size[..]].concat()).await.unwrap();
        assert!(packed.parse::<usize>().unwrap() < plain.len() / 5, "{packed} of {}", plain.len());
        assert_eq!(curl(&[http, "--compressed", &url]).await.unwrap(), plain, "{http}");
    }
}
