//! One of three control planes is up, or the one that is asked is down: what people see.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use exo_tests::{Trio, in_the_end, wait_for};

const WHY: &str = "no majority of voters: 1 of 3 answers";
/// kubectl would repeat a refusal with Retry-After for longer than that.
const SOON: Duration = Duration::from_secs(60);

/// Status and text of the gateway's answer.
fn ask(trio: &Trio, path: &str) -> anyhow::Result<(String, String)> {
    let url = trio.nodes[0].gateway()?.replace("/v1", path);
    let limit = SOON.as_secs().to_string();
    let output =
        Command::new("curl").args(["-s", "-w", "\n%{http_code}", "-m", &limit, &url]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let (text, code) = text.rsplit_once('\n').context("a code")?;
    ensure!(code != "000", "until it listens there is no answer");
    Ok((code.to_owned(), text.to_owned()))
}

fn kubectl(trio: &Trio, args: &[&str]) -> Option<String> {
    let output = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(trio.nodes[0].data_dir.join("kubeconfig"))
        .args(args)
        .env("HOME", trio.place.dir.join("kubectl-cache"))
        .output();
    let Ok(output) = output else {
        assert!(std::env::var_os("CI").is_none(), "kubectl is missing in CI");
        return None;
    };
    assert!(!output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stderr).unwrap())
}

#[test]
fn who_asks_a_minority_soon_reads_what_is_missing() {
    let mut trio = Trio::start(&["--no-agent"]).unwrap();
    let kubeconfig = trio.nodes[0].data_dir.join("kubeconfig");
    let addresses: Vec<String> = trio.nodes[1..]
        .iter()
        .map(|node| node.api().unwrap().trim_start_matches("https://").to_owned())
        .collect();
    wait_for("the first one to know the others", || {
        let text = fs::read_to_string(&kubeconfig)?;
        Ok(addresses.iter().all(|address| text.contains(address)).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    trio.nodes.iter_mut().for_each(|node| node.kill().unwrap());
    trio.nodes[0].relaunch().unwrap();

    in_the_end("the gateway to say why", || {
        let (code, text) = ask(&trio, "/v1/models")?;
        assert_eq!(code, "503", "{text}");
        ensure!(text.contains(WHY) && text.contains("mac-2 at "), "{text}");
        ensure!(text.contains("error"), "{text}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    let (code, text) = in_the_end("an answer", || ask(&trio, "/health")).unwrap();
    assert_eq!(code, "503", "{text}");
    for args in [&["get", "models"][..], &["create", "ns", "new"], &["delete", "model", "a"]] {
        in_the_end("kubectl to be told why", || {
            let begin = Instant::now();
            let Some(text) = kubectl(&trio, args) else { return Ok(()) };
            ensure!(text.contains(WHY), "{args:?}: {text}");
            ensure!(begin.elapsed() < SOON, "{args:?} took {:?}", begin.elapsed());
            Ok(())
        })
        .unwrap();
    }
    in_the_end("exoctl to be told why", || {
        let output = trio.exoctl(0, &["get", "models,instances"])?;
        let text = String::from_utf8(output.stderr)?;
        ensure!(text.matches(WHY).count() == 1 && text.contains("--stale"), "{text}");
        Ok(())
    })
    .unwrap();
    trio.exoctl_ok(0, &["get", "models,namespaces", "--stale"]).unwrap();

    for node in &mut trio.nodes[1..] {
        node.relaunch().unwrap();
    }
    for node in &mut trio.nodes {
        node.read_banner().unwrap();
    }
    in_the_end("the gateway", || {
        let (code, text) = ask(&trio, "/v1/models")?;
        ensure!(code == "200", "{code}: {text}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));

    // Another one is asked in place of the one that is down.
    trio.nodes[0].kill().unwrap();
    trio.leader_among(&[1, 2]).unwrap();
    in_the_end("exoctl to ask another one", || {
        let output = trio.exoctl(0, &["get", "namespaces", "-o", "name"])?;
        ensure!(output.stdout == b"namespace/default\n", "{output:?}");
        // The last one that it turned to, if the first it tried was late.
        let text = String::from_utf8(output.stderr)?;
        let (_, asked) = text.trim().rsplit_once(" does not answer: asking ").context("a note")?;
        ensure!(addresses.iter().any(|address| address == asked), "{text}");
        Ok(())
    })
    .unwrap();
}
