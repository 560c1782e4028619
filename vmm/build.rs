//! Links the program with packed relative relocations (RELR): the table is a tenth of the size, and every start reads it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
