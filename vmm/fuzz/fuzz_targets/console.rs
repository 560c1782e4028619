#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mote_vmm::fuzzing::run("console", data));
