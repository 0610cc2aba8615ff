//! One module per command.

mod apply;
mod delete;
mod describe;
mod documents;
mod get;
mod hopeless;
mod select;
mod version;
mod wait;

use std::io::Write;

use crate::{
    cli::{Args, Command, DryRun},
    server::Server,
};

/// Runs a command. What it prints goes to `out`; notes on progress go to stderr.
pub(crate) async fn run(args: Args, out: &mut dyn Write) -> anyhow::Result<()> {
    if let Command::Version(version) = &args.command {
        return version::run(version, &args.global, out).await;
    }
    if let Command::Apply(apply) = &args.command
        && apply.dry_run == Some(DryRun::Client)
    {
        return apply::check(apply, &args.global, out);
    }
    let server = Server::connect(&args.global).await?;
    match args.command {
        Command::Apply(args) => apply::run(&args, &server, out).await,
        Command::Get(args) => get::run(&args, &server, out).await,
        Command::Describe(args) => describe::run(&args, &server, out).await,
        Command::Delete(args) => delete::run(&args, &server, out).await,
        Command::Wait(args) => wait::run(&args, &server, out).await,
        Command::Version(_) => Ok(()),
    }
}
