//! The guest as a server under mote-vmm, with a DHCP and a metadata service that are just enough for it, in a network
//! namespace of the test. Skipped where /dev/kvm, root or /dev/net/tun is absent or the programs aren't built.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use mote_guest::host::{self, Monitor, Running, Unavailable};

const TIMEOUT: Duration = Duration::from_secs(30);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const META_DATA: &str = r#"{"uuid": "5f0c…", "hostname": "web-1.example", "meta": {"hostname": "no"}}"#;
/// Connections at once, fewer than the guest takes.
const CONNECTIONS: usize = 24;

/// Answers every DHCP message (RFC 2131) with GUEST, with and without option 121.
fn dhcp(option_121: bool) {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 67)).expect("port 67 of an own namespace");
    socket.set_broadcast(true).expect("a socket option");
    thread::spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((length, _)) = socket.recv_from(&mut packet) {
            // Option 53 is the first of smoltcp's options.
            if length < 243 || packet[240] != 53 {
                continue;
            }
            let kind = if packet[242] == 1 { 2 } else { 5 };
            let mut reply = packet[..240].to_vec();
            reply[0] = 2;
            reply[16..20].copy_from_slice(&GUEST.octets());
            reply.extend_from_slice(&[
                53, 1, kind, 54, 4, 10, 77, 0, 1, 51, 4, 0, 0, 14, 16, 1, 4, 255, 255, 255, 0,
            ]);
            if option_121 {
                reply.extend_from_slice(&[121, 14, 32, 169, 254, 169, 254, 10, 77, 0, 1, 0, 10, 77, 0, 1]);
            } else {
                reply.extend_from_slice(&[3, 4, 10, 77, 0, 1]);
            }
            reply.push(255);
            let _ = socket.send_to(&reply, (Ipv4Addr::BROADCAST, 68));
        }
    });
}

/// Serves both documents; the first answer to each is an error, so that the guest has to ask again.
fn metadata() {
    let listener = TcpListener::bind((METADATA, 80)).expect("port 80 of an own namespace");
    thread::spawn(move || {
        let mut asked = 0;
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 1024];
            let length = stream.read(&mut request).unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            asked += 1;
            let body = match request.split(' ').nth(1) {
                _ if asked == 1 => None,
                Some("/openstack/latest/meta_data.json") => Some(META_DATA),
                Some("/latest/meta-data/instance-id") => Some("i-0000002a"),
                _ => None,
            };
            let answer = match body {
                Some(body) => format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()),
                None => "HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(),
            };
            let _ = stream.write_all(answer.as_bytes());
        }
    });
}

fn get() -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((GUEST, 80)), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// CPU time of a process so far, in clock ticks (proc(5): utime, stime).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    [11, 12].iter().map(|&field: &usize| fields[field].parse::<u64>().expect("a number")).sum()
}

fn serve(option_121: bool) -> Result<(), Unavailable> {
    host::kvm_usable()?;
    let (monitor, guest) = (Monitor::Mote(host::vmm_path()?), host::guest_path()?);
    host::enter_network(&[&format!("{SERVER}/24"), &format!("{METADATA}/32")])?;
    dhcp(option_121);
    metadata();
    let mut config = host::config(&guest, "mote.serve");
    host::add_tap(&mut config, "tap0", "06:00:ac:10:00:02");
    let mut running = Running::start(&monitor, &config).expect("the monitor starts");
    let line = running.wait_for_line("serving on", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(line, format!("mote-guest: serving on {GUEST} as web-1.example (i-0000002a)"));

    let ping = Command::new("ping").args(["-c3", "-i0.2", "-W5", "10.77.0.2"]).stdout(Stdio::null()).status();
    match ping {
        Ok(status) => assert!(status.success(), "no answer to ping"),
        Err(error) => eprintln!("SKIPPED the ping: {error}"),
    }
    let page = get().expect("the page");
    for part in
        ["200 OK", "hostname: web-1.example", "instance-id: i-0000002a", "address: 10.77.0.2/24", META_DATA]
    {
        assert!(page.contains(part), "{part:?} is not in {page}");
    }
    let pages = thread::scope(|scope| {
        let all: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(get)).collect();
        all.into_iter().map(|one| one.join().expect("no panic")).collect::<Vec<_>>()
    });
    for one in pages {
        assert_eq!(one.expect("a page"), page);
    }

    let before = cpu_ticks(running.pid());
    thread::sleep(Duration::from_secs(2));
    let ticks = cpu_ticks(running.pid()) - before;
    eprintln!("idle: {ticks} ticks of CPU time in 2 s");
    // Polling would use all 200 of the usual clock ticks; the limit allows for a noisy machine.
    assert!(ticks < 60, "{ticks} ticks of CPU time in 2 s of idleness");

    running.terminate();
    let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(outcome.code, Some(5), "{}", outcome.log);
    Ok(())
}

fn in_thread(option_121: bool) {
    let outcome = thread::spawn(move || serve(option_121)).join();
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(why)) => eprintln!("SKIPPED: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[test]
fn the_server_finds_metadata_by_option_121() {
    in_thread(true);
}

#[test]
fn the_server_finds_metadata_through_the_router() {
    in_thread(false);
}
