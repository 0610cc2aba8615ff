//! What may follow the words typed so far, as far as the command line itself tells.
//!
//! Owns: reading an unfinished line. Never asks a server: it says what to ask for.

use std::path::PathBuf;

use clap::{Arg, ArgAction, Command};

use crate::cli::{Global, Shell};

/// The script for a shell; all it does is to call `exoctl __complete`.
pub(crate) fn script(shell: Shell) -> &'static str {
    match shell {
        Shell::Bash => include_str!("exoctl.bash"),
        Shell::Zsh => include_str!("exoctl.zsh"),
        Shell::Fish => include_str!("exoctl.fish"),
    }
}

/// One candidate and what to say about it.
pub(crate) type Candidate = (String, String);

/// What the word at the cursor can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// One of these.
    Fixed(Vec<Candidate>),
    /// A kind, or a kind and a name with a slash between them.
    Kind,
    /// The name of an object of this kind, without those that are there already.
    Name {
        kind: String,
        but: Vec<String>,
    },
    Namespace,
    Context,
    /// Anything: the shell offers files.
    Free,
}

/// An unfinished line, read.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) wanted: Wanted,
    /// What precedes the word proper, as in `--output=`.
    pub(crate) prefix: String,
    /// The word as far as it is typed, without the prefix.
    pub(crate) typed: String,
    /// Which server, and what of it.
    pub(crate) global: Global,
}

/// Reads what follows `exoctl`; the last word is the one at the cursor.
pub(crate) fn read(mut root: Command, words: &[String]) -> Line {
    root.build();
    let (typed, before) = words.split_last().map_or(("", &[][..]), |(w, rest)| (w.as_str(), rest));
    let mut reader = Reader {
        command: &root,
        is_root: true,
        positionals: Vec::new(),
        pending: None,
        last: None,
        options_end: false,
        global: Global { kubeconfig: None, context: None, namespace: None },
    };
    for word in before {
        reader.take(word);
    }
    let (prefix, typed) = match (reader.pending, typed.split_once('=')) {
        (None, Some((flag, value))) if flag.starts_with("--") => {
            reader.pending = reader.option(flag);
            (format!("{flag}="), value)
        }
        _ if typed == "=" => {
            reader.pending = reader.pending.or(reader.last);
            (String::new(), "")
        }
        _ => (String::new(), typed),
    };
    Line { wanted: reader.wanted(typed), prefix, typed: typed.to_owned(), global: reader.global }
}

struct Reader<'c> {
    command: &'c Command,
    is_root: bool,
    positionals: Vec<String>,
    /// The option whose value comes next.
    pending: Option<&'c Arg>,
    /// The option read last: some shells make a word of the `=` after it.
    last: Option<&'c Arg>,
    options_end: bool,
    global: Global,
}

impl<'c> Reader<'c> {
    fn take(&mut self, word: &str) {
        if let Some(arg) = self.pending {
            if word == "=" {
                return;
            }
            self.pending = None;
            self.note(arg, word);
        } else if word == "=" {
            self.pending = self.last;
        } else if word == "--" {
            self.options_end = true;
        } else if word.starts_with('-') && word.len() > 1 && !self.options_end {
            self.take_flag(word);
        } else if let (true, Some(sub)) = (self.is_root, self.command.find_subcommand(word)) {
            (self.command, self.is_root) = (sub, false);
        } else {
            self.positionals.push(word.to_owned());
        }
    }

    /// Reads `--flag`, `--flag=value`, `-f` or `-fvalue`.
    fn take_flag(&mut self, word: &str) {
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (word, None),
        };
        let arg = self.option(flag);
        self.last = arg.filter(|_| value.is_none());
        let Some(arg) = arg.filter(|arg| takes_value(arg)) else { return };
        let glued = (!flag.starts_with("--") && flag.len() > 2).then(|| &flag[2..]);
        match value.or(glued) {
            Some(value) => self.note(arg, value),
            None => self.pending = Some(arg),
        }
    }

    /// The option that `--flag` or `-f…` is.
    fn option(&self, flag: &str) -> Option<&'c Arg> {
        match flag.strip_prefix("--") {
            Some(long) => self.options().find(|arg| arg.get_long() == Some(long)),
            None => self.options().find(|arg| arg.get_short() == flag.chars().nth(1)),
        }
    }

    fn note(&mut self, arg: &Arg, value: &str) {
        let value = value.to_owned();
        match arg.get_id().as_str() {
            "kubeconfig" => self.global.kubeconfig = Some(PathBuf::from(value)),
            "context" => self.global.context = Some(value),
            "namespace" => self.global.namespace = Some(value),
            _ => {}
        }
    }

    fn options(&self) -> impl Iterator<Item = &'c Arg> + use<'c> {
        self.command.get_arguments().filter(|arg| !arg.is_positional() && !arg.is_hide_set())
    }

    fn wanted(&self, typed: &str) -> Wanted {
        if let Some(arg) = self.pending {
            return value_of(arg);
        }
        if typed.starts_with('-') && !self.options_end {
            let flags = self
                .options()
                .filter_map(|arg| Some((format!("--{}", arg.get_long()?), help(arg.get_help()))));
            return Wanted::Fixed(flags.collect());
        }
        if self.is_root {
            let commands = self.command.get_subcommands().filter(|c| !c.is_hide_set());
            let commands = commands.map(|c| (c.get_name().to_owned(), help(c.get_about())));
            return Wanted::Fixed(commands.collect());
        }
        self.positional()
    }

    fn positional(&self) -> Wanted {
        let rest = |from: usize| self.positionals.get(from..).unwrap_or_default().to_vec();
        let of_kind =
            |kind: &str, from: usize| Wanted::Name { kind: kind.to_owned(), but: rest(from) };
        match (self.command.get_name(), self.positionals.first()) {
            ("cordon" | "uncordon" | "drain", _) => of_kind("nodes", 0),
            ("explain", Some(_)) => of_kind("models", 1),
            ("logs", None) => of_kind("shards", 0),
            ("top", Some(kind)) => of_kind(kind, 1),
            (
                "get" | "describe" | "delete" | "wait" | "edit" | "patch" | "label" | "annotate"
                | "scale",
                first,
            ) => match first {
                None => Wanted::Kind,
                Some(first) if first.contains('/') => Wanted::Kind,
                Some(kind) => of_kind(kind, 1),
            },
            _ => {
                let mut positionals = self.command.get_positionals();
                positionals.nth(self.positionals.len()).map_or(Wanted::Free, value_of)
            }
        }
    }
}

fn takes_value(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
        // `--wait` and its like take a value only after `=`.
        && !arg.is_require_equals_set()
}

fn help(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(ToString::to_string).unwrap_or_default()
}

/// What the value of an option or argument can be.
fn value_of(arg: &Arg) -> Wanted {
    let fixed = |values: &[&str]| {
        Wanted::Fixed(values.iter().map(|value| ((*value).to_owned(), String::new())).collect())
    };
    match arg.get_id().as_str() {
        "namespace" => Wanted::Namespace,
        "context" => Wanted::Context,
        "output" => fixed(&["wide", "json", "yaml", "name", "jsonpath=", "custom-columns="]),
        "goal" => fixed(&["condition=Ready", "condition=", "jsonpath=", "create", "delete"]),
        "about" => Wanted::Kind,
        _ => {
            let values = arg.get_possible_values();
            let values = values.iter().filter(|value| !value.is_hide_set());
            let values: Vec<Candidate> =
                values.map(|value| (value.get_name().to_owned(), help(value.get_help()))).collect();
            if values.is_empty() { Wanted::Free } else { Wanted::Fixed(values) }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Args;

    fn line(text: &str) -> Line {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        read(Args::command(), &words)
    }

    fn names(wanted: &Wanted) -> Vec<&str> {
        match wanted {
            Wanted::Fixed(candidates) => candidates.iter().map(|(name, _)| name.as_str()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn commands_flags_and_values() {
        let wanted = line("").wanted;
        assert!(names(&wanted).contains(&"apply"));
        assert!(!names(&wanted).contains(&"__complete"));
        assert!(names(&line("get --").wanted).contains(&"--all-namespaces"));
        // Global flags go with every command.
        assert!(names(&line("get --").wanted).contains(&"--kubeconfig"));
        assert_eq!(names(&line("completion ").wanted), ["bash", "zsh", "fish"]);
        assert_eq!(
            names(&line("delete --cascade=").wanted),
            ["background", "foreground", "orphan"]
        );
        let equals = line("apply --dry-run=cl");
        assert_eq!((equals.prefix.as_str(), equals.typed.as_str()), ("--dry-run=", "cl"));
        assert_eq!(names(&equals.wanted), ["client", "server"]);
        let apart = line("delete --cascade = f");
        assert_eq!((names(&apart.wanted)[1], apart.typed.as_str()), ("foreground", "f"));
        assert_eq!(line("delete --cascade =").typed, "");
        assert_eq!(line("apply -f ").wanted, Wanted::Free);
        assert_eq!(line("get pods -n ").wanted, Wanted::Namespace);
    }

    #[test]
    fn kinds_and_names() {
        let name = |kind: &str, but: &[&str]| Wanted::Name {
            kind: kind.to_owned(),
            but: but.iter().map(|&name| name.to_owned()).collect(),
        };
        assert_eq!(line("get ").wanted, Wanted::Kind);
        assert_eq!(line("get -o yaml ").wanted, Wanted::Kind);
        assert_eq!(line("get --all-namespaces sha").wanted, Wanted::Kind);
        assert_eq!(line("describe shards a ").wanted, name("shards", &["a"]));
        assert_eq!(line("wait instance/a ").wanted, Wanted::Kind);
        assert_eq!(line("drain a ").wanted, name("nodes", &["a"]));
        assert_eq!(line("top nodes ").wanted, name("nodes", &[]));
        assert_eq!(line("wait --for ").prefix, "");
        assert!(names(&line("wait --for ").wanted).contains(&"delete"));
    }

    #[test]
    fn the_server_is_the_one_that_the_line_names() {
        let line = line("--kubeconfig /k get -nteam --context=c shards ");
        assert_eq!(line.global.kubeconfig, Some(PathBuf::from("/k")));
        assert_eq!(line.global.namespace.as_deref(), Some("team"));
        assert_eq!(line.global.context.as_deref(), Some("c"));
        assert_eq!(line.wanted, Wanted::Name { kind: "shards".to_owned(), but: Vec::new() });
    }
}
