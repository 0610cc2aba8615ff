//! The command line as typed: what clap reads.

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Parser, Subcommand, ValueEnum};

use crate::jsonpath::JsonPath;

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
    /// Lists resources
    Get(Get),
    /// Shows everything about resources
    Describe(Describe),
    /// Deletes resources
    Delete(Delete),
    /// Waits until resources are in a state
    Wait(Wait),
    /// Prints the versions of exoctl and of the server
    Version(Version),
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DryRun {
    Client,
    Server,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Get {
    /// Kind (several with commas), or KIND/NAME
    #[arg(value_name = "KIND", required = true)]
    pub(crate) kind: String,
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Output form
    #[arg(short, long, value_name = "FORM")]
    pub(crate) output: Option<Output>,
    /// Goes on printing changes
    #[arg(short, long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) select: Select,
    /// Leaves the header out
    #[arg(long)]
    pub(crate) no_headers: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Wide,
    Json,
    Yaml,
    Name,
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
    /// Label selector
    #[arg(short = 'l', long = "selector", value_name = "SEL", conflicts_with_all = ["files", "names", "all"])]
    pub(crate) labels: Option<String>,
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

#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// KIND/NAME, or KIND and names
    #[arg(value_name = "KIND/NAME", required = true)]
    pub(crate) objects: Vec<String>,
    /// condition=TYPE[=STATUS], delete, or jsonpath={.path}[=VALUE]
    #[arg(long = "for", value_parser = Goal::parse, value_name = "GOAL")]
    pub(crate) goal: Goal,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Version {
    /// Doesn't ask the server
    #[arg(long)]
    pub(crate) client: bool,
}

/// What to wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    Condition { kind: String, status: String },
    Delete,
    Path { path: JsonPath, value: Option<String> },
}

impl Goal {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "delete" {
            return Ok(Self::Delete);
        }
        match text.split_once('=') {
            Some(("condition", rest)) if !rest.is_empty() => {
                let (kind, status) = rest.split_once('=').unwrap_or((rest, "True"));
                Ok(Self::Condition { kind: kind.to_owned(), status: status.to_owned() })
            }
            Some(("jsonpath", rest)) => {
                // The value follows the closing brace; a path without braces holds no `=`.
                let (path, value) = match rest.rfind('}') {
                    Some(end) => (&rest[..=end], rest[end + 1..].strip_prefix('=')),
                    None => match rest.split_once('=') {
                        Some((path, value)) => (path, Some(value)),
                        None => (rest, None),
                    },
                };
                Ok(Self::Path {
                    path: path.parse().map_err(|error| format!("{error}"))?,
                    value: value.map(str::to_owned),
                })
            }
            _ => Err("expected condition=TYPE[=STATUS], delete or jsonpath={.path}[=VALUE]".into()),
        }
    }
}

/// Reads `90s`, `5m`, `1h30m`; a plain number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as 30s, 5m or 1h30m");
    let mut total_s = 0_f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let unit = units.iter().find(|(name, _)| rest.starts_with(name));
        let (name, factor) = match unit {
            Some((name, factor)) => (*name, *factor),
            None if rest.is_empty() && total_s == 0.0 => ("", 1.0),
            None => return Err(wrong()),
        };
        rest = &rest[name.len()..];
        total_s += number * factor;
    }
    match text {
        "" => Err(wrong()),
        _ => Duration::try_from_secs_f64(total_s).map_err(|_| wrong()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn reads_times() {
        let check = |text: &str, ms: u64| {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        };
        check("30", 30_000);
        check("0", 0);
        check("90s", 90_000);
        check("1h30m", 5_400_000);
        check("1.5s", 1_500);
        check("250ms", 250);
        for bad in ["", "s", "5x", "5m3", "-1s", "1e400h", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_goals() {
        let condition =
            |kind: &str, status: &str| Goal::Condition { kind: kind.into(), status: status.into() };
        let path = |path: &str, value: Option<&str>| Goal::Path {
            path: path.parse().unwrap(),
            value: value.map(str::to_owned),
        };
        let check = |text: &str, goal: Goal| assert_eq!(Goal::parse(text), Ok(goal), "{text}");
        check("condition=Ready", condition("Ready", "True"));
        check("condition=Ready=False", condition("Ready", "False"));
        check("delete", Goal::Delete);
        check("jsonpath={.status.phase}=Ready", path("{.status.phase}", Some("Ready")));
        check("jsonpath=.status.phase=Ready", path(".status.phase", Some("Ready")));
        check("jsonpath={.status.phase}", path(".status.phase", None));
        for bad in ["", "condition=", "ready", "jsonpath=", "jsonpath={.a[x]}"] {
            assert!(Goal::parse(bad).is_err(), "{bad}");
        }
    }
}
