//! What is logged: `EXO_LOG`, checked, and how.

use std::io::IsTerminal as _;

use anyhow::bail;
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// State changes of our own. What a library finds odd shows in what we make of it, in our words.
/// openraft reports each call to a node that is away as an error: the store says what matters of it.
const DEFAULT: &str = "info,openraft=off,kube_client=error,kube_runtime=error,tower=error,\
                       tower_http=error,hyper=error,hyper_util=error,h2=error,rustls=error,\
                       reqwest=error,sysinfo=error";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// Targets of our own, by which a misspelled one is told.
const OWN: [&str; 9] = [
    "exo",
    "exo_agent",
    "exo_apiserver",
    "exo_controllers",
    "exo_crds",
    "exo_gateway",
    "exo_plan",
    "exo_store",
    "exo_trust",
];

/// Starts the log on stderr.
///
/// # Errors
/// When `text`, the value of `EXO_LOG`, holds a directive that would have no effect.
pub(crate) fn start(text: Option<&str>, format: LogFormat) -> anyhow::Result<()> {
    let filter = filter(text)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

fn filter(text: Option<&str>) -> anyhow::Result<EnvFilter> {
    let Some(text) = text.filter(|text| !text.trim().is_empty()) else {
        return Ok(EnvFilter::new(DEFAULT));
    };
    let directives = directives(text);
    for directive in &directives {
        check(directive)?;
    }
    let text = directives.join(",");
    // A bare level is about our own words; libraries stay as quiet as they are without it, unless
    // everything is asked for.
    let level = text.to_lowercase();
    if matches!(level.as_str(), "error" | "warn" | "info" | "debug") {
        return Ok(EnvFilter::new(DEFAULT.replacen("info", &level, 1)));
    }
    match EnvFilter::try_new(&text) {
        Ok(filter) => Ok(filter),
        Err(error) => bail!("EXO_LOG: `{text}`: {error}"),
    }
}

/// The parts between commas; those inside of `[…]` and `{…}` separate nothing.
fn directives(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let separates = |c: char| {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    };
    text.split(separates).map(str::trim).filter(|part| !part.is_empty()).collect()
}

/// `LEVEL`, `TARGET=LEVEL` or `TARGET[SPAN]=LEVEL`. A bare target is refused: nearly always it is a
/// misspelled level, and as a target it would silence everything else.
fn check(directive: &str) -> anyhow::Result<()> {
    let is_level = |text: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(text));
    let (target, level) = match directive.rsplit_once('=') {
        Some((target, level)) if !level.ends_with(']') => (target, Some(level)),
        Some(_) | None => (directive, None),
    };
    match level {
        None if is_level(target) => return Ok(()),
        None if target.contains('[') => {}
        None => bail!(
            "EXO_LOG: `{directive}` is neither a level ({}) nor TARGET=LEVEL{}",
            LEVELS.join(", "),
            meant(directive, &LEVELS)
        ),
        Some(level) if is_level(level) => {}
        Some(level) => bail!(
            "EXO_LOG: `{directive}`: `{level}` is no level ({}){}",
            LEVELS.join(", "),
            meant(level, &LEVELS)
        ),
    }
    let root = target.split(['[', ':']).next().unwrap_or_default();
    if root.starts_with("exo") && !OWN.contains(&root) {
        bail!(
            "EXO_LOG: `{directive}`: nothing logs as `{root}`; there are {}{}",
            OWN.join(", "),
            meant(root, &OWN)
        );
    }
    Ok(())
}

/// The end of a message, when one of `words` has nearly the same letters.
fn meant(typed: &str, words: &[&str]) -> String {
    let typed = typed.to_lowercase();
    let letters = |text: &str| {
        let mut letters: Vec<char> = text.chars().collect();
        letters.sort_unstable();
        letters
    };
    // Letters in another order, then one too many or too few, then the beginning of a word.
    let swapped = |word: &str| letters(&typed) == letters(word);
    let one_more = |long: &str, short: &str| {
        let without = |i: usize| long.chars().enumerate().filter(move |(at, _)| *at != i);
        let len = long.chars().count();
        len == short.chars().count() + 1
            && (0..len).any(|i| without(i).map(|(_, c)| c).eq(short.chars()))
    };
    let missed = |word: &str| one_more(&typed, word) || one_more(word, &typed);
    let begun = |word: &str| typed.len() >= 3 && word.starts_with(&typed);
    let rules: [&dyn Fn(&str) -> bool; 3] = [&swapped, &missed, &begun];
    let word = rules.iter().find_map(|rule| words.iter().find(|word| rule(word)));
    word.map_or_else(String::new, |word| format!("; did you mean `{word}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_directives_pass() {
        for good in [
            "debug",
            "WARN",
            "info,exo_store=debug",
            "exo=trace, openraft=off",
            "exo_agent::shard[run{a=1}]=debug",
            "exo_agent[run]",
            "",
        ] {
            assert!(filter(Some(good)).is_ok(), "{good}: {:?}", filter(Some(good)).err());
        }
        assert!(filter(None).is_ok());
    }

    #[test]
    fn a_bad_directive_is_named() {
        for (bad, needles) in [
            ("inof", &["`inof`", "did you mean `info`?"][..]),
            ("info,exo_store=debg", &["`exo_store=debg`", "`debg`", "did you mean `debug`?"]),
            ("exo_agnet=debug", &["`exo_agnet`", "did you mean `exo_agent`?"]),
            ("warn,exo-store=debug", &["`exo-store`"]),
            ("verbose", &["`verbose`", "trace"]),
        ] {
            let error = filter(Some(bad)).unwrap_err().to_string();
            for needle in needles {
                assert!(error.contains(needle), "{bad}: {error}");
            }
        }
    }

    #[test]
    fn a_bare_level_keeps_libraries_quiet() {
        let of = |text: &str| filter(Some(text)).unwrap().to_string();
        assert!(of("debug").contains("openraft=off"), "{}", of("debug"));
        assert!(of("debug").contains("debug"));
        assert!(!of("trace").contains("openraft"), "{}", of("trace"));
    }
}
