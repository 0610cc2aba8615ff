//! Commands that change resources other than by files.

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;

use super::{
    DryRun, Select,
    parse::{duration, replicas},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Edit {
    /// Kind, or KIND/NAME
    #[arg(value_name = "KIND", required = true)]
    pub(crate) kind: String,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Patch {
    /// Kind, or KIND/NAME
    #[arg(value_name = "KIND", required = true)]
    pub(crate) kind: String,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// The patch, YAML or JSON
    #[arg(short, long, value_name = "PATCH", required_unless_present = "patch_file")]
    pub(crate) patch: Option<String>,
    /// File that holds the patch; - for stdin
    #[arg(long, value_name = "FILE|-", conflicts_with = "patch")]
    pub(crate) patch_file: Option<PathBuf>,
    /// How the patch says what to change
    #[arg(long = "type", value_name = "TYPE", default_value = "merge")]
    pub(crate) kind_of_patch: PatchKind,
    /// Part of the resource to change: status or scale
    #[arg(long, value_name = "NAME")]
    pub(crate) subresource: Option<String>,
    /// With `--type apply`: takes over fields that somebody else has set
    #[arg(long)]
    pub(crate) force_conflicts: bool,
    /// Only says what would happen
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "server",
          require_equals = true)]
    pub(crate) dry_run: Option<DryRun>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PatchKind {
    /// Fields to set; null removes (RFC 7396)
    Merge,
    /// A list of operations (RFC 6902)
    Json,
    /// Server-side apply: the fields that you want to be responsible for
    Apply,
    /// As merge, but lists are merged by their keys; Kubernetes' own kinds only
    Strategic,
}

/// What `label` and `annotate` share.
#[derive(Debug, clap::Args)]
pub(crate) struct Marks {
    /// KIND NAME… or KIND/NAME…, then KEY=VALUE to set and KEY- to remove
    #[arg(value_name = "KIND [NAME]… KEY=VALUE|KEY-", required = true)]
    pub(crate) words: Vec<String>,
    /// Replaces values that are there
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Every one of the kind
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) select: Select,
    /// Only prints those that are there
    #[arg(long)]
    pub(crate) list: bool,
    /// Only says what would happen
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "server",
          require_equals = true)]
    pub(crate) dry_run: Option<DryRun>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Label {
    #[command(flatten)]
    pub(crate) marks: Marks,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Annotate {
    #[command(flatten)]
    pub(crate) marks: Marks,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Scale {
    /// Kind, or KIND/NAME
    #[arg(value_name = "KIND", required = true)]
    pub(crate) kind: String,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// How many shall run
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = replicas)]
    pub(crate) replicas: u32,
    /// Only if so many are wanted now
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = replicas)]
    pub(crate) current_replicas: Option<u32>,
    /// Waits until the instances are Ready
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
    /// Only says what would happen
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "server",
          require_equals = true)]
    pub(crate) dry_run: Option<DryRun>,
}

/// Which nodes.
#[derive(Debug, clap::Args)]
pub(crate) struct Nodes {
    #[arg(value_name = "NODE", required_unless_present = "labels")]
    pub(crate) names: Vec<String>,
    /// Label selector, as in `rack=a`
    #[arg(short = 'l', long = "selector", value_name = "SEL", conflicts_with = "names")]
    pub(crate) labels: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cordon {
    #[command(flatten)]
    pub(crate) nodes: Nodes,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Uncordon {
    #[command(flatten)]
    pub(crate) nodes: Nodes,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Drain {
    #[command(flatten)]
    pub(crate) nodes: Nodes,
    /// How long to wait for the shards to go
    #[arg(long, default_value = "5m", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
    /// Only says which shards would go
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "server",
          require_equals = true)]
    pub(crate) dry_run: Option<DryRun>,
}
