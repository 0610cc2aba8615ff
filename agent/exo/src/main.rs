//! `exo`: the process that a machine runs. It wires control plane and agent together; every
//! decision lives in the crates it wires.

mod access;
mod config;
mod control;
mod data_dir;
mod dial;
mod join;
mod kubeconfig;
mod log;
mod membership;
mod metrics;
mod open;
mod part;
mod presence;
mod reach;
mod remote;
mod renew;
mod run;

use std::process::ExitCode;

use clap::Parser as _;
use config::{Command, RawArgs, Surroundings};

/// As for mistakes on the command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args = RawArgs::parse();
    if let Some(Command::Version) = args.command {
        print_line(&format!("exo {}", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    let log_format = args.log_format();
    let log = std::env::var("EXO_LOG").ok();
    if let Err(error) = log::start(log.as_deref(), log_format) {
        eprintln!("exo: {error:#}");
        return ExitCode::from(USAGE);
    }
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: RawArgs) -> anyhow::Result<()> {
    let config = args.check(&Surroundings::observe())?;
    exo_trust::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run::run(config))
}

/// Prints to stdout; a reader that has gone away is no error.
pub(crate) fn print_line(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
