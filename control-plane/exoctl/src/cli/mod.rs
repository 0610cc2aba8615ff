//! The command line as typed: what clap reads.

mod change;
mod parse;

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Parser, Subcommand, ValueEnum};

pub(crate) use change::{
    Annotate, Cordon, Drain, Edit, Label, Marks, Nodes, Patch, PatchKind, Scale, Uncordon,
};
pub(crate) use parse::{Goal, Output};

use parse::duration;

#[derive(Debug, Parser)]
#[command(
    name = "exoctl",
    version,
    about = "Controls an exo cluster",
    disable_help_subcommand = true
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Kubeconfig file [default: $KUBECONFIG, then the one the local exo wrote]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Namespace [default: the context's]
    #[arg(short, long, global = true, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates or changes resources so that they are as the files say
    Apply(Apply),
    /// Shows what apply would change; exit status 1 means that there is something, 2 a failure
    Diff(Diff),
    /// Lists resources
    Get(Get),
    /// Shows everything about resources, with their events
    Describe(Describe),
    /// Lists what happened, the newest last
    Events(Events),
    /// Deletes resources
    Delete(Delete),
    /// Waits until resources are in a state
    Wait(Wait),
    /// Opens resources in an editor and applies what was changed
    Edit(Edit),
    /// Changes fields of resources
    Patch(Patch),
    /// Sets (KEY=VALUE) and removes (KEY-) labels
    Label(Label),
    /// Sets (KEY=VALUE) and removes (KEY-) annotations
    Annotate(Annotate),
    /// Sets how many replicas of an instance run
    Scale(Scale),
    /// Keeps new shards off nodes; running ones stay
    Cordon(Cordon),
    /// Lets nodes take new shards again
    Uncordon(Uncordon),
    /// Cordons nodes and moves their shards elsewhere
    Drain(Drain),
    /// Says where an instance of a model would go now, and why not elsewhere
    Explain(Explain),
    /// Shows memory and throughput as last reported
    Top(Top),
    /// Prints the last lines that a failed shard's runner logged
    Logs(Logs),
    /// Lists the kinds of resources that the server has
    ApiResources(ApiResources),
    /// Prints the script that completes commands in a shell
    Completion(Completion),
    /// Prints the kubeconfig in use, for other Kubernetes clients
    Kubeconfig(Kubeconfig),
    /// Prints the versions of exoctl and of the server
    Version(Version),
    /// What may follow the words typed so far; for the completion scripts
    #[command(name = "__complete", hide = true)]
    Complete(Complete),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Apply {
    /// YAML or JSON file, folder of such files, or - for stdin
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Waits until the instances are Ready
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
    /// Only checks: `client` without, `server` with the server's help
    #[arg(long, value_name = "WHERE")]
    pub(crate) dry_run: Option<DryRun>,
    /// Takes over fields that somebody else has set
    #[arg(long)]
    pub(crate) force_conflicts: bool,
    /// Accepted for those used to kubectl: apply always is server-side
    #[arg(long, hide = true)]
    pub(crate) server_side: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Diff {
    /// YAML or JSON file, folder of such files, or - for stdin
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// As if apply took over fields that somebody else has set
    #[arg(long)]
    pub(crate) force_conflicts: bool,
    /// Accepted for those used to kubectl: apply always is server-side
    #[arg(long, hide = true)]
    pub(crate) server_side: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DryRun {
    Client,
    Server,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Get {
    /// Kind (several with commas; `exoctl api-resources` lists them), or KIND/NAME
    #[arg(value_name = "KIND")]
    pub(crate) kind: Option<String>,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// wide, json, yaml, name, jsonpath=TEMPLATE, custom-columns=NAME:PATH,…
    #[arg(short, long, value_name = "FORM", value_parser = Output::parse)]
    pub(crate) output: Option<Output>,
    /// Goes on printing changes
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// Prints changes only, not what is there already
    #[arg(long)]
    pub(crate) watch_only: bool,
    #[command(flatten)]
    pub(crate) select: Select,
    /// Order by the value at a path, as in .metadata.creationTimestamp
    #[arg(long, value_name = "PATH", value_parser = parse::path)]
    pub(crate) sort_by: Option<crate::jsonpath::JsonPath>,
    /// Leaves the header out
    #[arg(long)]
    pub(crate) no_headers: bool,
    /// Adds the labels as a last column
    #[arg(long)]
    pub(crate) show_labels: bool,
    /// It is no error when a named object isn't there
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
    /// Shows what the asked server has, old or not: works without a majority
    #[arg(long, conflicts_with_all = ["watch", "watch_only"])]
    pub(crate) stale: bool,
    /// Shows in yaml and json which client is responsible for which field
    #[arg(long)]
    pub(crate) show_managed_fields: bool,
}

/// Which objects of a kind.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Select {
    /// Label selector, as in `exo.dev/instance=llama`
    #[arg(short = 'l', long = "selector", value_name = "SEL")]
    pub(crate) labels: Option<String>,
    /// Field selector, as in `spec.node=studio-1`
    #[arg(long = "field-selector", value_name = "SEL")]
    pub(crate) fields: Option<String>,
    /// In every namespace
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Describe {
    /// Kind, or KIND/NAME
    #[arg(value_name = "KIND", required = true)]
    pub(crate) kind: String,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    #[command(flatten)]
    pub(crate) select: Select,
    /// Leaves the events out
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
          require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) show_events: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Events {
    /// Only those about this object
    #[arg(long = "for", value_name = "KIND/NAME")]
    pub(crate) about: Option<String>,
    /// Only those of these types: Normal, Warning
    #[arg(long, value_name = "TYPE", value_delimiter = ',')]
    pub(crate) types: Vec<String>,
    /// In every namespace
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
    /// Goes on printing what happens
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// Leaves the header out
    #[arg(long)]
    pub(crate) no_headers: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Delete {
    /// Kind, or KIND/NAME
    #[arg(value_name = "KIND", required_unless_present = "files")]
    pub(crate) kind: Option<String>,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// What these files name
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", conflicts_with = "kind")]
    pub(crate) files: Vec<PathBuf>,
    /// Every one of the kind
    #[arg(long, conflicts_with_all = ["files", "names"])]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) select: Select,
    /// What becomes of the objects that it owns
    #[arg(long, value_name = "HOW", default_value = "background", num_args = 0..=1,
          default_missing_value = "background", require_equals = true)]
    pub(crate) cascade: Cascade,
    /// Only says what would be deleted
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "server",
          require_equals = true)]
    pub(crate) dry_run: Option<DryRun>,
    /// Returns only when they are gone
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
          require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
    /// It is no error when there is nothing to delete
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
}

/// What becomes of the dependents of a deleted object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cascade {
    /// They are deleted afterwards
    Background,
    /// They go first
    Foreground,
    /// They stay
    Orphan,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// KIND/NAME, or KIND and names
    #[arg(value_name = "KIND/NAME", required = true)]
    pub(crate) objects: Vec<String>,
    /// condition=TYPE[=STATUS], jsonpath={.path}[=VALUE], create or delete
    #[arg(long = "for", value_parser = Goal::parse, value_name = "GOAL")]
    pub(crate) goal: Goal,
    /// Every one of the kind
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) select: Select,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Explain {
    #[arg(value_name = "placement")]
    pub(crate) what: ExplainWhat,
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// On exactly so many nodes
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nodes: Option<u32>,
    /// How to split the model
    #[arg(long, default_value = "auto", ignore_case = true, value_name = "HOW")]
    pub(crate) sharding: ShardingArg,
    /// How ranks talk
    #[arg(long, default_value = "auto", ignore_case = true, value_name = "HOW")]
    pub(crate) transport: TransportArg,
    /// Tokens of context [default: the model's limit]
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(16..))]
    pub(crate) context_length: Option<u32>,
    /// Labels that a node must carry, as in `rack=a`
    #[arg(short = 'l', long = "selector", value_name = "SEL")]
    pub(crate) labels: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExplainWhat {
    Placement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShardingArg {
    Auto,
    Pipeline,
    Tensor,
}

impl ShardingArg {
    /// As resources say it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::Pipeline => "Pipeline",
            Self::Tensor => "Tensor",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportArg {
    Auto,
    Jaccl,
    Ring,
    Nccl,
}

impl TransportArg {
    /// As resources say it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::Jaccl => "Jaccl",
            Self::Ring => "Ring",
            Self::Nccl => "Nccl",
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Top {
    #[arg(value_name = "nodes|shards")]
    pub(crate) what: TopOf,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    #[command(flatten)]
    pub(crate) select: Select,
    /// Leaves the header out
    #[arg(long)]
    pub(crate) no_headers: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TopOf {
    #[value(alias = "node")]
    Nodes,
    #[value(alias = "shard")]
    Shards,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Logs {
    /// A shard
    #[arg(value_name = "SHARD")]
    pub(crate) shard: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ApiResources {
    /// Leaves the header out
    #[arg(long)]
    pub(crate) no_headers: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Completion {
    #[arg(value_name = "SHELL")]
    pub(crate) shell: Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Complete {
    /// What follows `exoctl` on the line, the word at the cursor last
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) words: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Kubeconfig {
    /// Address to write instead of the known one, for use on another machine
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) server: Option<String>,
    /// Prints the path of the file instead of what is in it
    #[arg(long, conflicts_with = "server")]
    pub(crate) path: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Version {
    /// Doesn't ask the server
    #[arg(long)]
    pub(crate) client: bool,
    /// Output form
    #[arg(short, long, value_name = "json|yaml", value_parser = Output::parse)]
    pub(crate) output: Option<Output>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }
}
