//! One module per command.

mod api_resources;
mod apply;
mod complete;
mod cordon;
mod delete;
mod describe;
mod diff;
mod documents;
mod edit;
mod events;
mod explain;
mod get;
mod hopeless;
mod kubeconfig;
mod label;
mod logs;
mod patch;
mod scale;
mod select;
mod teller;
mod top;
mod version;
mod wait;

use std::io::Write;

use crate::{
    cli::{Args, Command, DryRun},
    server::Server,
};

/// Runs a command. What it prints goes to `out`; notes on progress go to stderr.
pub(crate) async fn run(args: Args, out: &mut dyn Write) -> anyhow::Result<()> {
    let Args { global, command } = args;
    match &command {
        Command::Version(args) => return version::run(args, &global, out).await,
        Command::Apply(args) if args.dry_run == Some(DryRun::Client) => {
            return apply::check(args, &global, out);
        }
        Command::Completion(args) => return complete::script(args.shell, out),
        Command::Complete(args) => return complete::run(&args.words, out).await,
        Command::Kubeconfig(args) => return kubeconfig::run(args, &global, out),
        _ => {}
    }
    let server = Server::connect(&global).await?;
    if let Some(note) = &server.note {
        eprintln!("{note}");
    }
    match command {
        Command::Apply(args) => apply::run(&args, &server, out).await,
        Command::Diff(args) => diff::run(&args, &server, out).await,
        Command::Get(args) => get::run(&args, &server, out).await,
        Command::Describe(args) => describe::run(&args, &server, out).await,
        Command::Events(args) => events::run(&args, &server, out).await,
        Command::Delete(args) => delete::run(&args, &server, out).await,
        Command::Wait(args) => wait::run(&args, &server, out).await,
        Command::Edit(args) => edit::run(&args, &server, out).await,
        Command::Patch(args) => patch::run(&args, &server, out).await,
        Command::Label(args) => label::run(&args.marks, label::LABELS, &server, out).await,
        Command::Annotate(args) => label::run(&args.marks, label::ANNOTATIONS, &server, out).await,
        Command::Scale(args) => scale::run(&args, &server, out).await,
        Command::Cordon(args) => cordon::run(&args.nodes, true, &server, out).await,
        Command::Uncordon(args) => cordon::run(&args.nodes, false, &server, out).await,
        Command::Drain(args) => cordon::drain(&args, &server, out).await,
        Command::Explain(args) => explain::run(&args, &server, out).await,
        Command::Top(args) => top::run(&args, &server, out).await,
        Command::ApiResources(args) => api_resources::run(&args, &server, out).await,
        Command::Logs(args) => logs::run(&args, &server, out).await,
        // Done above: they need no server, or find it themselves.
        Command::Version(_)
        | Command::Completion(_)
        | Command::Complete(_)
        | Command::Kubeconfig(_) => Ok(()),
    }
}

/// What follows a result that was not carried out.
fn dry_run_suffix(dry_run: Option<DryRun>) -> &'static str {
    match dry_run {
        None => "",
        Some(DryRun::Client) => " (dry run)",
        Some(DryRun::Server) => " (server dry run)",
    }
}

/// The query of a change: who makes it, and whether it is only tried.
fn change_query(
    manager: &'static str,
    dry_run: Option<DryRun>,
) -> Vec<(&'static str, &'static str)> {
    let mut query = vec![("fieldManager", manager), ("fieldValidation", "Strict")];
    query.extend(dry_run.map(|_| ("dryRun", "All")));
    query
}
