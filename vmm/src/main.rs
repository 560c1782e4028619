//! `mote-vmm`: see the library.
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(mote_vmm::cli::main())
}
