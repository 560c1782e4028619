//! `mote`: one command for the whole cloud. See the library.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    mote::main()
}
