//! `mote.serve`: the smallest useful server image. Takes its address by DHCP, answers ping, reads its metadata from
//! 169.254.169.254 and serves a page that shows it. Between packets the processor halts.

mod fetch;
mod http;
mod mmds;
mod plugged;
mod stack;

use alloc::format;
use alloc::string::{String, ToString};

use mote_guest::json;
use smoltcp::wire::Ipv4Cidr;

use crate::boot::Boot;
use crate::report::Report;
use crate::virtio::{self, Kind};
use crate::{cpu, println};
use plugged::Plugged;
use stack::Stack;

pub use mmds::run as mmds;

const META_DATA: &str = "/openstack/latest/meta_data.json";
const INSTANCE_ID: &str = "/latest/meta-data/instance-id";

/// What the metadata service told.
pub struct Identity {
    hostname: String,
    instance_id: String,
    raw: String,
}

/// Serves for ever; returns only if there is no usable network device.
pub fn run(boot: &Boot) {
    cpu::calibrate();
    cpu::enable_interrupts();
    if let Err(why) = serve(boot) {
        let mut report = Report::default();
        report.result("serve", Err(why));
        report.finish();
    }
}

fn serve(boot: &Boot) -> Result<(), String> {
    let windows = virtio::discover(boot);
    let window = windows.iter().find(|window| window.kind == Kind::Net).ok_or("no network device")?;
    let mut stack = Stack::new(window)?;
    let mut plugged = Plugged::new(boot);
    let address = stack.wait_for_address();
    let identity = identify(&mut stack);
    println!(
        "mote-guest: serving on {} as {} ({})",
        address.address(),
        identity.hostname,
        identity.instance_id
    );
    http::serve(&mut stack, |stack| page(&identity, stack.address()), || plugged.look(boot))
}

fn identify(stack: &mut Stack) -> Identity {
    let raw = fetch::get(stack, META_DATA).unwrap_or_else(|why| {
        println!("mote-guest: {META_DATA}: {why}");
        String::new()
    });
    let instance_id = fetch::get(stack, INSTANCE_ID).unwrap_or_else(|why| {
        println!("mote-guest: {INSTANCE_ID}: {why}");
        String::from("unknown")
    });
    let hostname = json::string_member(&raw, "hostname").unwrap_or_else(|| String::from("unknown"));
    Identity { hostname: printable(&hostname), instance_id: printable(&instance_id), raw }
}

/// One line without control characters: it goes to the console.
fn printable(text: &str) -> String {
    text.trim().chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

fn page(identity: &Identity, address: Option<Ipv4Cidr>) -> String {
    let address = address.map_or_else(|| String::from("none"), |address| address.to_string());
    format!(
        "mote-guest\nhostname: {}\ninstance-id: {}\naddress: {address}\nmetadata: {}\n",
        identity.hostname, identity.instance_id, identity.raw
    )
}
