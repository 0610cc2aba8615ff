//! `exo`: the process that a machine runs. It wires control plane and agent together; every
//! decision lives in the crates it wires.

mod access;
mod config;
mod control;
mod data_dir;
mod join;
mod membership;
mod open;
mod remote;
mod run;

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser as _;
use config::{Command, LogFormat, RawArgs, Surroundings};
use tracing_subscriber::EnvFilter;

/// State changes of our own; libraries only when something is odd. openraft reports each call to a
/// node that is away as an error; what matters of that the store says itself.
const DEFAULT_LOG: &str = "info,openraft=off,kube=warn,tower=warn,hyper=warn";

fn main() -> ExitCode {
    let args = RawArgs::parse();
    if let Some(Command::Version) = args.command {
        print_line(&format!("exo {}", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
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
    start_log(config.log_format);
    exo_trust::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run::run(config))
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("EXO_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Prints to stdout; a reader that has gone away is no error.
pub(crate) fn print_line(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
