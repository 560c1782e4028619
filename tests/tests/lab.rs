//! Debian under mote-vmm by REST, and the conformance guest under an ordinary `kvm_amd`: on this machine where it has
//! hardware virtualization, else on a host in the lab that joins the cloud.

mod common;

use std::time::Duration;

use common::{guest_image, need_servers, on_hardware, run};
use mote_tests::{
    cloud::Cloud,
    journey::{self, ImageFiles, Journey},
    lab,
    steps::Steps,
};

#[test]
fn debian_and_the_conformance_guest_live_by_rest_on_a_host_with_hardware_virtualization() {
    need_servers!();
    let Some(debian) = lab::debian_dir() else {
        eprintln!("SKIPPED: the Debian image is not built (./test builds it: mote-image build-debian)");
        return;
    };
    run(async {
        let mut steps = Steps::new();
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let mut journey = Journey::guest(guest_image(&client, "mote.serve").await?, cloud.server_dirs());
        journey.patience = Duration::from_secs(180);
        let name = format!("test{}", std::process::id());
        let lab = on_hardware(&cloud, &client, &name, &mut journey, &mut steps).await?;
        journey.zone = lab.as_ref().map(|_| "lab".into());
        journey.travel(&client, "guest-there", &mut steps).await?;
        journey.image_id = journey::image(&client, &ImageFiles::bundle("debian", &debian)?).await?;
        journey.flavor = "m1.tiny".into();
        journey.console_mark = "mote-debian: ready".into();
        // The image's trait leads to the host that has what it needs.
        journey.zone = None;
        journey.travel(&client, "debian-there", &mut steps).await
    });
}
