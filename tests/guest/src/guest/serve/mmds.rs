//! `mote.mmds=A.B.C.D/P`: reads the monitor's own metadata service, version 2, and tries what it must refuse.

use alloc::format;
use alloc::string::String;
use core::str::FromStr;

use smoltcp::wire::{Ipv4Address, Ipv4Cidr};

use super::fetch::ask;
use super::stack::Stack;
use crate::boot::Boot;
use crate::report::Report;
use crate::virtio::{self, Kind};
use crate::{cpu, ensure};

/// Bytes of the value that is longer than any buffer on the way.
const LONG: usize = 40_000;
/// More connections than the service keeps.
const CONNECTIONS: usize = 40;

/// Runs the tests and reports.
pub fn run(boot: &Boot) {
    cpu::calibrate();
    cpu::enable_interrupts();
    let mut report = Report::default();
    match stack(boot) {
        Err(why) => report.result("mmds-network", Err(why)),
        Ok(mut stack) => {
            let stack = &mut stack;
            report.result("mmds-needs-a-token", without_token(stack));
            report.result("mmds-gives-no-token-for-nothing", refused_tokens(stack));
            report.result("mmds-with-a-token", with_token(stack));
            report.result("mmds-many-connections", many(stack));
        }
    }
    report.finish();
}

fn stack(boot: &Boot) -> Result<Stack, String> {
    let text = boot.command_line.value("mote.mmds").unwrap_or("");
    let (address, prefix) = text.split_once('/').ok_or("mote.mmds must be ADDRESS/PREFIX")?;
    let address = Ipv4Address::from_str(address).map_err(|_| "mote.mmds has no address")?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or("mote.mmds has no prefix")?;
    let windows = virtio::discover(boot);
    let window = windows.iter().find(|window| window.kind == Kind::Net).ok_or("no network device")?;
    Stack::with_address(window, Ipv4Cidr::new(address, prefix))
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: mmds\r\nConnection: close\r\n{headers}\r\n")
}

fn put(headers: &str) -> String {
    format!("PUT /latest/api/token HTTP/1.1\r\nHost: mmds\r\nConnection: close\r\n{headers}\r\n")
}

fn expect(stack: &mut Stack, request: &str, status: &str) -> Result<String, String> {
    let (found, body) = ask(stack, request)?;
    ensure!(found == status, "status {found} instead of {status}: {body}");
    Ok(body)
}

fn without_token(stack: &mut Stack) -> Result<(), String> {
    expect(stack, &get("/latest/meta-data/", ""), "401")?;
    expect(stack, &get("/latest/meta-data/", "X-metadata-token: bm8=\r\n"), "401")?;
    expect(stack, "DELETE / HTTP/1.1\r\nConnection: close\r\n\r\n", "405")?;
    Ok(())
}

fn refused_tokens(stack: &mut Stack) -> Result<(), String> {
    expect(stack, &put(""), "400")?;
    expect(stack, &put("X-metadata-token-ttl-seconds: 21601\r\n"), "400")?;
    expect(stack, &put("X-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 10.0.0.1\r\n"), "400")?;
    Ok(())
}

fn token(stack: &mut Stack) -> Result<String, String> {
    expect(stack, &put("X-aws-ec2-metadata-token-ttl-seconds: 60\r\n"), "200")
}

fn with_token(stack: &mut Stack) -> Result<(), String> {
    let token = token(stack)?;
    let header = format!("X-metadata-token: {token}\r\n");
    let list = expect(stack, &get("/latest/meta-data/", &header), "200")?;
    ensure!(list == "ami-id\nlong", "unexpected list {list:?}");
    let text = expect(stack, &get("/latest/meta-data/ami-id", &header), "200")?;
    ensure!(text == "ami-87654321", "unexpected text {text:?}");
    let json = format!("{header}Accept: application/json\r\n");
    let json = expect(stack, &get("/latest/meta-data/ami-id", &json), "200")?;
    ensure!(json == "\"ami-87654321\"", "unexpected JSON {json:?}");
    let long = expect(stack, &get("/latest/meta-data/long", &header), "200")?;
    ensure!(long.len() == LONG && long.bytes().all(|byte| byte == b'l'), "{} bytes, or others", long.len());
    expect(stack, &get("/latest/nothing", &header), "404")?;
    Ok(())
}

fn many(stack: &mut Stack) -> Result<(), String> {
    let header = format!("X-aws-ec2-metadata-token: {}\r\n", token(stack)?);
    for _ in 0..CONNECTIONS {
        // Kept alive, and left.
        let request = format!("GET /latest/meta-data/ami-id HTTP/1.1\r\n{header}\r\n");
        expect(stack, &request, "200")?;
    }
    Ok(())
}
