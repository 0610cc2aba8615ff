//! The loader on model folders that are broken in random ways: every one is refused with an error that names
//! something, or runs. It never panics, and takes neither much time nor memory.
//!
//! How long, and from which seed: see `exo_test_support::fuzz`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod models;
mod mutate;
mod random;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use exo_engine::{Engine, EngineError, LoadConfig, LoadError, Sampling, Sharding, Step};
use exo_test_support::fuzz::Seeds;
use models::{Folder, LAYERS, WEIGHTS};
use random::Random;
use safetensors::SafeTensors;

/// Inputs of an ordinary run: enough to meet every kind of change a few dozen times.
const INPUTS: u64 = 2_000;
/// For one input. A header of megabytes takes a debug build a while.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// What the process's address space may grow by over all inputs: files are below 2 MB, and buffers are reused.
const MEMORY_LIMIT_BYTES: u64 = 512 << 20;

fn load(dir: &Path) -> Result<Engine, EngineError> {
    let config = LoadConfig {
        model_dir: dir.to_owned(),
        layers: 0..LAYERS,
        sharding: Sharding::Pipeline,
        group: None,
        context_length: 0,
    };
    Engine::load(&config, &mut |_| {})
}

/// A short answer; what was loaded must be fit for use.
fn run(engine: &mut Engine) -> Result<(), EngineError> {
    engine.open(1, &Sampling::greedy().into());
    let step = Step::Prefill { seq: 1, tokens: vec![0, 0, 0], sample: true, draw: 0 };
    let drawn = engine.step(&step)?.unwrap().token;
    engine.step(&Step::Decode { seq: 1, token: drawn, draw: 1 }).map(drop)
}

fn write(dir: &Path, folder: &Folder) {
    for entry in fs::read_dir(dir).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    for (name, content) in folder {
        fs::write(dir.join(name), content).unwrap();
    }
}

/// The most address space that this process has had. Unlike resident memory it also counts what was only asked for.
fn peak_memory_bytes() -> u64 {
    // Elsewhere there is no such file; the limit is then not checked.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// What became of an input, in a few words.
fn outcome(result: &Result<(), EngineError>) -> &'static str {
    match result {
        Ok(()) => "runs",
        Err(EngineError::Config(_)) => "bad configuration",
        Err(EngineError::Layers(_)) => "layers do not fit",
        Err(EngineError::Load(error)) => match error {
            LoadError::Io { .. } => "can't read",
            LoadError::NoWeights { .. } => "no weights",
            LoadError::BadHeader { .. } => "bad header",
            LoadError::BadIndex { .. } => "bad index",
            LoadError::Truncated { .. } => "truncated",
            LoadError::Duplicate { .. } => "duplicate",
            LoadError::MissingFile { .. } => "missing file",
            LoadError::NotFinite { .. } => "not finite",
            LoadError::Split { .. } => "can't be split",
            LoadError::Mismatch(_) => "mismatch",
            LoadError::Device { .. } => "no room on the device",
        },
        Err(EngineError::Mlx(_)) => "MLX refused",
        Err(_) => "step refused",
    }
}

/// Checks one input; says what became of it, or what is wrong.
fn check(dir: &Path, folder: &Folder) -> Result<&'static str, String> {
    write(dir, folder);
    let began = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| {
        load(dir)
            .map_err(|error| (error, "load"))
            .and_then(|mut engine| run(&mut engine).map_err(|error| (error, "run")))
    }));
    let result = result.map_err(|_| "it panicked".to_owned())?;
    if began.elapsed() > TIME_LIMIT {
        return Err(format!("it took {:?}", began.elapsed()));
    }
    let result = match result {
        Ok(()) => Ok(()),
        Err((error, "load")) => {
            named(&error, dir)?;
            Err(error)
        }
        // A small vocabulary or context is no fault.
        Err((error @ (EngineError::Token { .. } | EngineError::ContextFull { .. }), _)) => {
            Err(error)
        }
        Err((error, _)) => return Err(format!("what was loaded does not run: {error}")),
    };
    if !matches!(result, Err(EngineError::Load(LoadError::BadHeader { .. }))) {
        well_formed(dir, folder, &result)?;
    }
    Ok(outcome(&result))
}

/// Whether an error says where to look.
fn named(error: &EngineError, dir: &Path) -> Result<(), String> {
    let text = error.to_string();
    let places = [".safetensors", "config.json", "index.json", "tensor '", "model.", "lm_head"];
    let folder = dir.display().to_string();
    let named = places.iter().chain([&folder.as_str()]).any(|place| text.contains(place));
    let layers = matches!(error, EngineError::Layers(_));
    if named || layers { Ok(()) } else { Err(format!("the error names nothing: {text}")) }
}

/// The format's reference implementation reads what this one has accepted, with the same tensors.
fn well_formed(
    dir: &Path,
    folder: &Folder,
    result: &Result<(), EngineError>,
) -> Result<(), String> {
    // An index leads elsewhere; and only what was loaded was surely read.
    if matches!(result, Err(EngineError::Config(_) | EngineError::Load(_) | EngineError::Layers(_)))
        || dir.join(models::INDEX).exists()
    {
        return Ok(());
    }
    let content = &folder[WEIGHTS];
    match SafeTensors::read_metadata(content) {
        Ok(_) => Ok(()),
        // Free text is not looked at here: the reference wants it to be texts.
        Err(error) if error.to_string().contains("invalid type") => Ok(()),
        Err(error) => Err(format!("the reference refuses it: {error}")),
    }
}

#[test]
fn broken_folders_are_refused_by_name_or_run() {
    let dir = tempfile::tempdir().unwrap();
    let bases = models::all();
    for (name, folder) in &bases {
        assert_eq!(check(dir.path(), folder), Ok("runs"), "{name}");
    }
    let memory = peak_memory_bytes();
    let mut seeds = Seeds::new(INPUTS);
    let mut outcomes = BTreeMap::new();
    let mut findings = Vec::new();
    for seed in seeds.by_ref() {
        let mut random = Random::new(seed);
        let (name, base) = random.pick(&bases);
        let mut folder = base.clone();
        let change = mutate::mutate(&mut folder, &mut random);
        let mut found = check(dir.path(), &folder);
        let grown = peak_memory_bytes().saturating_sub(memory);
        if found.is_ok() && grown > MEMORY_LIMIT_BYTES {
            found = Err(format!("memory has grown by {} MB", grown >> 20));
        }
        match found {
            Ok(outcome) => *outcomes.entry(outcome).or_insert(0) += 1,
            Err(finding) => findings.push(format!("seed {seed}: {name}, {change}: {finding}")),
        }
        if findings.len() == 20 {
            break;
        }
    }
    let grown = peak_memory_bytes().saturating_sub(memory) >> 20;
    println!("{seeds}, {grown} MB more: {outcomes:#?}");
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

#[test]
fn weights_that_are_no_file_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut folder) = models::all().remove(0);
    folder.remove(WEIGHTS);
    write(dir.path(), &folder);
    let weights = dir.path().join(WEIGHTS);
    // Nobody writes into the pipe: whoever opens it waits for ever.
    let made = std::process::Command::new("mkfifo").arg(&weights).status().unwrap();
    assert!(made.success());
    let refusal = || load(dir.path()).err().expect("must be refused").to_string();
    assert!(refusal().contains("no regular file"), "{}", refusal());
    fs::remove_file(&weights).unwrap();
    fs::create_dir(&weights).unwrap();
    assert!(refusal().contains("no regular file"), "{}", refusal());
}
