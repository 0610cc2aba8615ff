//! Writes `bindings.rs` for mlx-sys from mlx-c's headers; run by `deploy/mlx/setup.sh` alone.
//! Owns the two types that the headers can't express; never builds or links anything.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// `float16_t` is a struct and `bfloat16_t` a number because mlx-rs reads them as such: they must be
/// different types, and that is how bindgen names them on ARM.
const HALF_TYPES: &str = "#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct float16_t(pub u16);
pub type bfloat16_t = u16;";

fn headers(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut headers = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "h") && !path.ends_with("half.h") {
            headers.push(path);
        }
    }
    headers.sort();
    Ok(headers)
}

fn write(args: &[String]) -> Result<(), String> {
    let [mlx_c, shim, output, clang_args @ ..] = args else {
        return Err("usage: exo-mlx-bindings MLX_C_DIR SHIM_H OUTPUT_RS [CLANG_ARG…]".into());
    };
    let folder = Path::new(mlx_c).join("mlx/c");
    let mut builder = bindgen::Builder::default()
        .clang_args(["-x", "c", &format!("-I{mlx_c}"), "-include", shim])
        .clang_args(clang_args)
        .blocklist_type("float16_t|bfloat16_t")
        .blocklist_function("malloc|realloc")
        .raw_line(HALF_TYPES)
        .formatter(bindgen::Formatter::None);
    for header in headers(&folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        builder = builder.header(header.to_string_lossy());
    }
    let bindings = builder.generate().map_err(|e| e.to_string())?;
    bindings.write_to_file(output).map_err(|e| format!("{output}: {e}"))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match write(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("exo-mlx-bindings: {message}");
            ExitCode::FAILURE
        }
    }
}
