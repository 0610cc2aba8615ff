//! Lets binaries find MLX's shared library where `deploy/mlx/setup.sh` put it (not needed on macOS, where
//! MLX is linked statically).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DEP_MLX_LIB_DIR");
    if let Ok(lib_dir) = std::env::var("DEP_MLX_LIB_DIR") {
        // RUNPATH, not RPATH, so that LD_LIBRARY_PATH can put another build of MLX first.
        println!("cargo::rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{lib_dir}");
        println!("cargo::metadata=lib_dir={lib_dir}");
    }
}
