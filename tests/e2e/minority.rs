//! One of three control planes is up, or the one that is asked is down: what people see.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use exo_tests::{Trio, wait_for};

const WHY: &str = "no majority of voters: 1 of 3 answers";
/// kubectl would repeat a refusal with Retry-After for longer than that.
const SOON: Duration = Duration::from_secs(20);

/// Status and text of the gateway's answer.
fn ask(trio: &Trio, path: &str) -> anyhow::Result<Option<(String, String)>> {
    let url = trio.nodes[0].gateway()?.replace("/v1", path);
    let limit = SOON.as_secs().to_string();
    let output =
        Command::new("curl").args(["-s", "-w", "\n%{http_code}", "-m", &limit, &url]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let answer = text.rsplit_once('\n').map(|(text, code)| (code.to_owned(), text.to_owned()));
    // Until it listens there is no answer.
    Ok(answer.filter(|(code, _)| code != "000"))
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

    let (code, text) = wait_for("an answer", || ask(&trio, "/v1/models")).unwrap();
    assert_eq!(code, "503", "{text}");
    assert!(text.contains(WHY) && text.contains("mac-2 at ") && text.contains("error"), "{text}");
    let (code, text) = ask(&trio, "/health").unwrap().unwrap();
    assert_eq!(code, "503", "{text}");
    for args in [&["get", "models"][..], &["create", "ns", "new"], &["delete", "model", "a"]] {
        let begin = Instant::now();
        let Some(text) = kubectl(&trio, args) else { break };
        assert!(text.contains(WHY), "{args:?}: {text}");
        assert!(begin.elapsed() < SOON, "{args:?} took {:?}", begin.elapsed());
    }
    let output = trio.exoctl(0, &["get", "models,instances"]).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.matches(WHY).count(), 1, "{text}");
    assert!(text.contains("--stale"), "{text}");
    trio.exoctl_ok(0, &["get", "models,namespaces", "--stale"]).unwrap();

    for node in &mut trio.nodes[1..] {
        node.relaunch().unwrap();
    }
    for node in &mut trio.nodes {
        node.read_banner().unwrap();
    }
    wait_for("the gateway", || Ok(ask(&trio, "/v1/models")?.filter(|(code, _)| code == "200")))
        .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));

    // Another one is asked in place of the one that is down.
    trio.nodes[0].kill().unwrap();
    trio.leader_among(&[1, 2]).unwrap();
    let output = trio.exoctl(0, &["get", "namespaces", "-o", "name"]).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "namespace/default\n");
    let text = String::from_utf8(output.stderr).unwrap();
    let (_, asked) = text.trim().split_once(" does not answer: asking ").unwrap();
    assert!(addresses.iter().any(|address| address == asked), "{text}");
}
