"""What has the source committed?"""
