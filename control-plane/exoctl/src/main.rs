//! `exoctl`: the command line of the control plane, for people who know kubectl.
//!
//! Owns: how commands read and print. It is a Kubernetes client like any other; every rule about
//! resources lives in the API server. Links no MLX.

mod cli;
mod commands;
mod completion;
mod config;
mod error;
mod jsonpath;
mod kinds;
mod merge;
mod output;
mod schema;
mod server;
mod servers;
mod table;

use std::{
    io::{self, BufWriter, Write as _},
    process::ExitCode,
};

use clap::Parser as _;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    // As of diff itself: 1 is an answer.
    let trouble = if matches!(args.command, cli::Command::Diff(_)) { 2 } else { 1 };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into(), trouble),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let result = runtime.block_on(commands::run(args, &mut out)).and_then(|()| Ok(out.flush()?));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // `exoctl get … | head` is no failure.
        Err(error) if error::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<error::Differs>() => ExitCode::FAILURE,
        Err(error) => {
            // What was printed before the failure still counts.
            let _ = out.flush();
            fail(&error, trouble)
        }
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    let mut err = io::stderr().lock();
    for line in error::lines(error) {
        // Nobody is left to tell when stderr is gone.
        let _ = writeln!(err, "{line}");
    }
    ExitCode::from(code)
}
