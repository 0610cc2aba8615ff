//! `exoctl version`.

use std::io::Write;

use serde_json::{Value, json};

use crate::{
    cli::{Global, Output, Version},
    output::write_value,
    server::{Form, Server},
};

pub(super) async fn run(
    args: &Version,
    global: &Global,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let client = env!("CARGO_PKG_VERSION");
    match &args.output {
        None => writeln!(out, "Client Version: {client}")?,
        Some(Output::Json | Output::Yaml) => {}
        Some(_) => anyhow::bail!("versions are printed as json or yaml"),
    }
    // What is known without the server is told even when it can't be reached.
    let asked = match args.client {
        true => Ok(None),
        false => ask(global).await.map(Some),
    };
    let server = match &asked {
        Ok(Some(server)) => Some(server),
        Ok(None) | Err(_) => None,
    };
    match (&args.output, server) {
        (None, None) => {}
        (None, Some(server)) => {
            let git = server["gitVersion"].as_str().unwrap_or("unknown");
            writeln!(out, "Server Version: {git}")?;
        }
        (Some(form), server) => {
            let mut versions = json!({"clientVersion": {"version": client}});
            if let Some(server) = server {
                versions["serverVersion"] = server.clone();
            }
            write_value(form, versions, out)?;
        }
    }
    asked.map(|_| ())
}

async fn ask(global: &Global) -> anyhow::Result<Value> {
    Server::connect(global).await?.get("/version", &[], Form::Json).await
}
