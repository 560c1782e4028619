//! Gives the freestanding guest its own linker script. RUSTFLAGS would reach build scripts too, so the arguments are
//! for this package's binaries only.

fn main() {
    println!("cargo:rerun-if-changed=guest.ld");
    if std::env::var_os("CARGO_FEATURE_FREESTANDING").is_none() {
        return;
    }
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{directory}/guest.ld");
}
