//! Completion in the shells themselves. Skipped where a shell is missing, but not in CI.

use std::path::Path;

use tokio::process::Command;

use crate::cluster::{Cluster, PATIENCE};

/// A cluster with two shards; `None` without the shell.
async fn start(shell: &str) -> Option<Cluster> {
    if Command::new(shell).args(["-c", "true"]).output().await.is_err() {
        assert!(std::env::var_os("CI").is_none(), "{shell} is missing in CI");
        eprintln!("there is no {shell} here: nothing is tested");
        return None;
    }
    let cluster = Cluster::start().await;
    cluster.create_shards().await;
    Some(cluster)
}

/// What a script prints that finds `exoctl` on its path.
async fn run(cluster: &Cluster, shell: &[&str], script: &str) -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_exoctl")).parent().unwrap().display();
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).args(["-c", script]).env("PATH", format!("{bin}:{path}"));
    // Shells read and write files of their own at home.
    command.env("HOME", cluster.dir.path()).env("XDG_CONFIG_HOME", cluster.dir.path());
    command.env("EXO_HOME", cluster.dir.path()).env_remove("KUBECONFIG").env("TERM", "dumb");
    let output = command.current_dir(cluster.dir.path()).kill_on_drop(true).output();
    let output = tokio::time::timeout(PATIENCE, output).await.expect("the shell ends").unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn bash_completes_with_what_the_server_has() {
    let Some(cluster) = start("bash").await else { return };
    let complete = async |words: &str| {
        let script = format!(
            "source <(exoctl completion bash); COMP_WORDS=(exoctl {words})\n\
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _exoctl; echo \"${{COMPREPLY[*]}}\""
        );
        run(&cluster, &["bash"], &script).await
    };
    assert_eq!(complete("app").await, "apply\n");
    assert_eq!(complete("get shards ''").await, "llama-0-a1-0 llama-0-a1-1\n");
    assert_eq!(complete("delete --cascade = o").await, "orphan\n");
    assert_eq!(complete("apply -f ./").await, "\n");
}

#[tokio::test]
async fn fish_completes_with_what_the_server_has() {
    let Some(cluster) = start("fish").await else { return };
    std::fs::write(cluster.dir.path().join("tiny.yaml"), "").unwrap();
    let complete = async |line: &str| {
        let script = format!("exoctl completion fish | source; complete -C '{line}'");
        let candidates = run(&cluster, &["fish", "--no-config"], &script).await;
        // What it is follows a tab.
        let words = candidates.lines().map(|line| line.split('\t').next().unwrap().to_owned());
        words.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(complete("exoctl app").await, "apply");
    assert_eq!(complete("exoctl get shards ").await, "llama-0-a1-0 llama-0-a1-1");
    assert_eq!(complete("exoctl delete --cascade=o").await, "--cascade=orphan");
    assert_eq!(complete("exoctl apply -f ti").await, "tiny.yaml");
}

/// Types into a shell on a terminal of its own. `^T` writes down what stands on the line then.
const ZSH: &str = r#"
zmodload zsh/zpty
lines=$1
type() { zpty -w -n shell "$1" }
zpty -b shell "zsh -f -i"
zpty -w shell "PS1=; KEYTIMEOUT=1; unsetopt beep; autoload -Uz compinit; compinit -u -D"
zpty -w shell "source <(exoctl completion zsh)"
zpty -w shell "show() { print -r -- \"\$BUFFER\" >>$lines; BUFFER= }; zle -N show; bindkey '^T' show"
for line in "${@:2}"; do type "$line"$'\x14'; done
# Its output must be read lest it stop; a file tells of the end.
for try in {1..600}; do
    zpty -rt shell text
    [ -f $lines ] && (( $(wc -l <$lines) >= $# - 1 )) && break
    sleep 0.1
done
zpty -d shell
cat $lines
"#;

#[tokio::test]
async fn zsh_completes_with_what_the_server_has() {
    let Some(cluster) = start("zsh").await else { return };
    std::fs::write(cluster.dir.path().join("tiny.yaml"), "").unwrap();
    let typed = [
        "exoctl app\t",
        "exoctl get shards ll\t1\t",
        "exoctl delete --cascade=o\t",
        "exoctl apply -f ti\t",
    ];
    let script = cluster.dir.path().join("type.zsh");
    std::fs::write(&script, ZSH).unwrap();
    let typed = typed.map(|line| format!("$'{}'", line.replace('\t', "\\t"))).join(" ");
    let call = format!("source {} $PWD/lines {typed}", script.display());
    let lines = run(&cluster, &["zsh", "-f"], &call).await;
    let lines: Vec<&str> = lines.lines().map(str::trim_end).collect();
    assert_eq!(
        lines,
        [
            "exoctl apply",
            "exoctl get shards llama-0-a1-1",
            "exoctl delete --cascade=orphan",
            "exoctl apply -f tiny.yaml",
        ]
    );
}
