//! One process is one rank of a model. Owns the command line; the work is in the modules.

mod bench;
mod generate;
mod guard;
mod printer;
mod sampling;
mod serve;
mod step_path;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serves MLX and the C++ beneath it as well: a step is some thousand small allocations there.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "exo-runner", version, about = "Runs one rank of a model")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt and print the answer.
    Generate(generate::Args),
    /// Measure prefill and decoding on random prompts.
    Bench(bench::Args),
    /// Serve one rank of a shard, as an agent starts it.
    Serve(serve::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Serve(args) => serve::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
